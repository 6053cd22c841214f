"""A study that begins with the best trials of another one."""

from __future__ import annotations

import pytest
from synthetic import REFERENCE, SPACE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.config.schema import Config
from jaxtune.errors import UserError
from jaxtune.search import Study
from jaxtune.search.run import starting_trials
from jaxtune.search.settings import Settings
from jaxtune.search.space import Space
from jaxtune.search.warm_start import best_configurations


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A finished study, and its finished trials without the reference, best first."""
    run_dir = tmp_path_factory.mktemp("earlier")
    summary = Study(run_dir, search_config(trials=10, promote=4), SyntheticRunner(), reference=REFERENCE).run()
    assert summary is not None
    finished = [trial for trial in summary["trials"] if trial["final_score"] is not None and trial["id"]]
    return run_dir, [trial["configuration"] for trial in sorted(finished, key=lambda trial: trial["final_score"])]


def space(changes=None):
    return Space(search_config(space={**SPACE, **(changes or {})}).space)


def test_the_best_finished_trials_best_first(earlier):
    run_dir, finished = earlier
    assert best_configurations(run_dir, space(), 3) == finished[:3]
    assert best_configurations(run_dir, space(), 99) == finished
    rates = sorted(one["optimizer.learning_rate"] for one in finished)
    narrow = space({"optimizer.learning_rate": {"log_uniform": (rates[1] * 0.999, 1e-2)}})
    assert len(best_configurations(run_dir, narrow, 99)) == len(finished) - 1


def test_they_come_first_and_are_learnt_from(earlier, tmp_path):
    start = earlier[1][:2]
    search = search_config(trials=7, promote=1, initial=4)
    arguments = {"reference": REFERENCE, "start": start}
    assert Study(tmp_path / "whole", search, SyntheticRunner(), **arguments).run() is not None
    proposed = [record for record in records(tmp_path / "whole") if record["event"] == "proposed"]
    assert [record["configuration"] for record in proposed[1:3]] == start
    assert [record["source"] for record in proposed] == [
        "reference", "transfer", "transfer", "design", *["surrogate"] * 3
    ]  # fmt: skip
    assert proposed[-1]["told"] == [0, 1, 2, 3, 4]
    stopped = SyntheticRunner()
    stopped.before = interrupt_at(1, 10)
    assert Study(tmp_path / "again", search, stopped, **arguments).run() is None
    assert Study(tmp_path / "again", search, SyntheticRunner(), **arguments).run() is not None
    assert records(tmp_path / "again") == records(tmp_path / "whole")


def test_a_study_that_has_nothing_to_give_is_refused(earlier, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        best_configurations(tmp_path / "nowhere", space(), 3)
    with pytest.raises(UserError, match=r"search\.start_from: .* over update\.0\.ranks.*update\.0\.rank"):
        best_configurations(earlier[0], space({"update.0.ranks": {"integer": (1, 2)}}), 3)
    far = space({"optimizer.learning_rate": {"log_uniform": (1.0, 10.0)}})
    with pytest.raises(UserError, match=r"of 4 finished trials in .* none lies in search\.space"):
        best_configurations(earlier[0], far, 3)


@pytest.mark.parametrize(("changes", "key"), [({"initial": 1}, "initial 1"), ({"trials": 1, "promote": 1}, "trials 1")])
def test_a_study_without_a_place_for_them_is_refused(earlier, changes, key):
    with pytest.raises(ValueError, match=rf"start_from: with {key} the first trial, .* set .* to 2 or more"):
        search_config(start_from=str(earlier[0]), **changes)
    search_config(start_from=str(earlier[0]), trials=2, promote=1, initial=2)


def test_a_study_that_has_begun_without_them_is_refused(earlier, tmp_path):
    """It would go on as if nothing had been asked for."""
    search = search_config(trials=3, promote=1)
    assert Study(tmp_path, search, SyntheticRunner(), reference=REFERENCE).run() is not None
    data = {"train": "rows.jsonl", "validation": "rows.jsonl", "prompt": "{question}", "completion": "{answer}"}
    settings = {"model": {"path": "m"}, "data": data, "train": {"steps": 50}, "run_dir": str(tmp_path)}
    later = {**search.model_dump(exclude_none=True), "start_from": str(earlier[0])}
    with pytest.raises(UserError, match=r"search\.start_from: the study in .* has begun without"):
        starting_trials(Settings.of(Config.model_validate({**settings, "search": later})))
