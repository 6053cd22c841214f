"""Studies with every search method: the journal's form is the same, and one that was killed ends the same."""

from __future__ import annotations

import pytest
from synthetic import REFERENCE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.errors import UserError
from jaxtune.search import Study


def study(run_dir, method: str, runner=None) -> Study:
    search = search_config(method=method, trials=7, promote=2)
    return Study(run_dir, search, runner or SyntheticRunner(), reference=REFERENCE, base={"name": "test"})


@pytest.mark.parametrize(("method", "learnt"), [("random", "random"), ("tpe", "surrogate"), ("hyperband", "surrogate")])
def test_a_stopped_study_goes_on_to_the_same_end(tmp_path, method, learnt):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = study(whole, method).run()
    assert summary is not None
    runner = SyntheticRunner()
    runner.before = interrupt_at(5, 10)
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
