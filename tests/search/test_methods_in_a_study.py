"""Studies with every search method: the journal's form is the same, and one that was killed ends the same."""

from __future__ import annotations

import pytest
from synthetic import REFERENCE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.errors import UserError
from jaxtune.search import Study
from jaxtune.search.methods.hyperband import Hyperband


def study(run_dir, method: str, runner=None) -> Study:
    search = search_config(method=method, trials=7, promote=2)
    return Study(run_dir, search, runner or SyntheticRunner(), reference=REFERENCE, base={"name": "test"})


@pytest.mark.parametrize(
    ("method", "learnt", "step"),
    [("random", "random", 10), ("sobol", "design", 10), ("tpe", "surrogate", 10), ("hyperband", "surrogate", 2)],
)
def test_a_stopped_study_goes_on_to_the_same_end(tmp_path, method, learnt, step):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = study(whole, method).run()
    assert summary is not None
    runner = SyntheticRunner()
    runner.before = interrupt_at(5, step)
    assert study(parts, method, runner).run() is None
    assert study(parts, method).run() is not None
    assert records(parts) == records(whole)
    sources = [record["source"] for record in records(whole) if record["event"] == "proposed"]
    design = "random" if method == "random" else "design"
    assert sources == ["reference", *[design] * 3, *[learnt] * 3]


def test_a_study_is_not_continued_with_another_method(tmp_path):
    runner = SyntheticRunner()
    runner.before = interrupt_at(1, 10)
    assert study(tmp_path, "random", runner).run() is None
    with pytest.raises(UserError, match=r"search\.method"):
        study(tmp_path, "tpe").run()


def test_a_stopped_trial_is_not_promoted_and_told_as_stopped(tmp_path, monkeypatch):
    """Trials are told their fate by number: every second one is stopped at the first rung, the good ones too."""
    told = []
    propose = Hyperband.propose

    def recorded(self, trial, observations, pending):
        told.append([one.stopped for one in observations])
        return propose(self, trial, observations, pending)

    monkeypatch.setattr(Hyperband, "propose", recorded)
    monkeypatch.setattr(Hyperband, "stops", lambda self, trial, until, reports: trial % 2 == 1)
    study = Study(
        tmp_path,
        search_config(method="hyperband", trials=8, promote=8),
        SyntheticRunner(),
        reference=REFERENCE,
        base={"name": "test"},
    )
    summary = study.run()
    assert summary is not None
    finished = {trial["id"] for trial in summary["trials"] if trial["final_score"] is not None}
    assert finished
    assert not any(number % 2 for number in finished)
    assert set(told[-1]) == {None, 1}, "at the first rung"
