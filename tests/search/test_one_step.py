"""Whatever ranks, promotes, proposes or explains takes scores of one step, and a divergence wherever it came."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from synthetic import REFERENCE, SyntheticRunner, records, search_config

from jaxtune.search import Study
from jaxtune.search.journal import Journal
from jaxtune.search.methods.gaussian_process import GaussianProcess
from jaxtune.search.methods.hyperband import Hyperband
from jaxtune.search.observation import Observation


class Exact(SyntheticRunner):
    """Scores without noise of unknown error; ``lost`` trials diverge beyond a step.

    Args:
      lost: trial → the last step at which it still has a score.
    """

    def __init__(self, lost: dict[int, int] | None = None):
        super().__init__(noise=0.0, divergence=1.0)
        self.lost = lost or {}

    def run(self, trial, until):
        outcome = dataclasses.replace(super().run(trial, until), standard_error=None)
        if until > self.lost.get(trial.id, until):
            return dataclasses.replace(outcome, score=math.nan, diverged=True)
        return outcome

    def test(self, trial):
        return None


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Nothing is put on the disk for good, and no summary explains anything where that is not looked at."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    if "explains" not in request.node.name:
        monkeypatch.setattr("jaxtune.search.summary.partial_dependence", lambda posterior, sign: ([], {}))


def search(run_dir: Path, runner: SyntheticRunner | None = None, **changes: Any) -> dict[str, Any]:
    run = Study(run_dir, search_config(**changes), runner or Exact(), reference=REFERENCE, base={"name": "test"})
    summary = run.run()
    assert summary is not None
    return summary


def extend(run_dir: Path, **changed: Any) -> None:
    """What ``study extend`` writes into the journal."""
    with Journal(run_dir) as journal:
        journal.append("changed", **changed)


def events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in records(run_dir) if record["event"] == event]


@pytest.fixture
def told(monkeypatch) -> list[list[Observation]]:
    """What the Gaussian process is told, proposal by proposal."""
    seen: list[list[Observation]] = []
    propose = GaussianProcess.propose

    def recorded(self, trial, observations, pending):
        seen.append(list(observations))
        return propose(self, trial, observations, pending)

    monkeypatch.setattr(GaussianProcess, "propose", recorded)
    return seen


# Trials that do not depend on scores: what is compared is what becomes of them.
LADDER = {"trials": 9, "promote": 2, "fraction": 0.4, "ladder": [0.1, 0.2], "method": "random"}
LEARNING = {**LADDER, "method": "gp", "initial": 8}


def test_a_rung_ranked_again_stops_only_trials_that_wait_there(tmp_path, told):
    first = search(tmp_path, **LEARNING)
    before = {trial["id"]: trial for trial in first["trials"]}
    length = len(records(tmp_path))
    extend(tmp_path, trials=15)
    told.clear()
    second = search(tmp_path, **{**LEARNING, "trials": 15})
    after = {trial["id"]: trial for trial in second["trials"]}
    assert all(after[number] == trial for number, trial in before.items() if trial["status"] in ("stopped", "finished"))
    new = records(tmp_path)[length:]
    stopped = [record["trial"] for record in new if record["event"] == "stopped"]
    assert stopped
    reported = {(record["trial"], record["step"]) for record in records(tmp_path) if record["event"] == "reported"}
    assert {(record["trial"], record["step"]) for record in new if record["event"] == "stopped"} <= reported
    assert not {number for number in stopped if before.get(number, {}).get("early_score") is not None}
    # Every score that the surrogate is told is the one at the first rung.
    rung = {record["score"] for record in records(tmp_path) if record["event"] == "reported" and record["step"] == 5}
    assert {one.score for one in told[-1]} <= rung
    assert len(told[-1]) == 13


def test_journals_that_call_finished_trials_stopped_are_read_as_they_were_meant(tmp_path):
    first = search(tmp_path, **LADDER)
    finished = next(trial for trial in first["trials"] if trial["status"] == "finished" and trial["id"])
    with Journal(tmp_path) as journal:
        journal.append("stopped", trial=finished["id"], configuration=finished["configuration"], step=5)
    assert search(tmp_path, **LADDER)["trials"] == first["trials"]


@pytest.mark.parametrize(("changes", "last"), [({}, 5), ({"ladder": []}, 20)])
def test_what_diverges_later_is_told_as_diverged(tmp_path, told, changes, last):
    """After a rung, or after the fraction: once it is known, its earlier score is none that a proposal learns from."""
    settings = {**LEARNING, **changes}
    best = search(tmp_path / "first", **settings)["best"]["trial"]
    run_dir = tmp_path / "lost"
    summary = search(run_dir, Exact({best: last}), **settings)
    assert next(trial for trial in summary["trials"] if trial["id"] == best)["status"] == "failed"
    extend(run_dir, trials=10)
    told.clear()
    search(run_dir, Exact({best: last}), **{**settings, "trials": 10})
    point = next(record for record in events(run_dir, "proposed") if record["trial"] == best)["configuration"]
    rate = point["optimizer.learning_rate"]
    assert [one.score for one in told[-1] if one.point[0] == rate] == [None]
    assert sum(one.score is None for one in told[-1]) == 1


def test_what_diverged_takes_no_place_in_the_half_of_a_rung(tmp_path):
    """Of nine that have a score there and may go on, five do, a new one the last of them."""
    best = search(tmp_path / "first", **LADDER)["best"]["trial"]
    run_dir = tmp_path / "lost"
    search(run_dir, Exact({best: 5}), **LADDER)
    extend(run_dir, trials=11)
    summary = search(run_dir, Exact({best: 5}), **{**LADDER, "trials": 11})
    stopped = {record["trial"] for record in events(run_dir, "stopped") if record["step"] == 5}
    ranked = {record["trial"]: record["score"] for record in events(run_dir, "reported") if record["step"] == 5}
    del ranked[0], ranked[best]
    half = sorted(ranked, key=ranked.__getitem__)[: math.ceil(len(ranked) / 2)]
    assert half[-1] >= LADDER["trials"]
    assert half[-1] not in stopped
    assert {number for number in ranked if number >= LADDER["trials"] and number not in half} <= stopped
    assert summary["best"]["trial"] != best


@pytest.mark.parametrize("ladder", [[0.05], [0.05, 0.1]])
def test_the_summary_explains_the_score_at_the_fraction(tmp_path, ladder):
    """The schedule costs three nats at the rungs and nothing at the fraction."""

    class Fading(Exact):
        def value(self, configuration, step):
            late = 3.0 * (configuration["optimizer.schedule"] == "linear") * (step < 20)
            return self.floor({**configuration, "optimizer.schedule": "cosine"}) + late

    settings = {"trials": 16, "initial": 16, "promote": 2, "fraction": 0.4, "ladder": ladder}
    summary = search(tmp_path, Fading(), **settings)
    scored = [trial["early_score"] for trial in summary["trials"] if trial["early_score"] is not None]
    assert len(scored) >= 4
    assert summary["importance"]["optimizer.schedule"] < 0.3
    for curve in summary["partial_dependence"]:
        assert max(curve["mean"]) < max(scored) + 0.2


def test_hyperband_promotes_the_best_survivors(tmp_path):
    """What was stopped at a rung has a score that says nothing of those at the fraction."""
    pytest.importorskip("optuna")
    for seed in (4, 9):
        run_dir = tmp_path / str(seed)
        settings = {"method": "hyperband", "trials": 20, "initial": 20, "promote": 2, "fraction": 0.4}
        summary = search(run_dir, **settings, seed=seed)
        early = {trial["id"]: trial["early_score"] for trial in summary["trials"] if trial["id"]}
        survivors = sorted((score, number) for number, score in early.items() if score is not None)
        assert [record["trial"] for record in events(run_dir, "promoted")] == [number for _, number in survivors[:2]]


def test_trials_of_another_length_are_compared_rung_by_rung(tmp_path, monkeypatch):
    """Every second trial is twice as long, and has its rungs at other steps."""
    pytest.importorskip("optuna")
    asked = []
    stops = Hyperband.stops

    def recorded(self, trial, until, reports):
        asked.append((until, {step for scores in reports.values() for step in scores}))
        return stops(self, trial, until, reports)

    monkeypatch.setattr(Hyperband, "stops", recorded)

    class Uneven(Exact):
        def total_steps(self, trial):
            return 50 * (1 + trial.id % 2)

    search(tmp_path, Uneven(), method="hyperband", trials=10, initial=10, promote=2, fraction=0.36)
    assert {until for until, _ in asked} == {18, 36}
    assert all(steps <= {until // 9, until // 3} for until, steps in asked)


def repeats(run_dir: Path, runner: SyntheticRunner, cuts: list[int], **settings: Any) -> None:
    """A study whose journal is cut before some of its lines writes the very same lines again."""
    lines = (run_dir / "trials.jsonl").read_text().splitlines(keepends=True)
    whole = records(run_dir)
    for cut in cuts:
        again = run_dir.with_name(f"cut{cut}")
        again.mkdir()
        (again / "trials.jsonl").write_text("".join(lines[:cut]))
        search(again, runner, **settings)
        assert records(again) == whole, lines[cut]


def lines_of(run_dir: Path, event: str) -> list[int]:
    texts = (run_dir / "trials.jsonl").read_text().splitlines()
    return [number for number, line in enumerate(texts) if json.loads(line)["event"] == event]


def test_a_study_cut_before_a_trial_is_stopped_stops_it(tmp_path):
    pytest.importorskip("optuna")
    settings = {"method": "hyperband", "trials": 16, "initial": 16, "promote": 1, "fraction": 0.4, "seed": 1}
    search(tmp_path / "whole", **settings)
    cuts = lines_of(tmp_path / "whole", "stopped")
    assert len(cuts) >= 2
    repeats(tmp_path / "whole", Exact(), [cuts[0], cuts[-1]], **settings)


def test_a_ladder_cut_anywhere_repeats_itself(tmp_path):
    """In an extended study too, and where trials diverge that the half of a rung was counted with."""
    run_dir = tmp_path / "whole"
    best = [record["trial"] for record in sorted(events_of_all(tmp_path / "first"), key=lambda record: record["score"])]
    lost = Exact({best[0]: 5, best[1]: 10, best[2]: 20})
    search(run_dir, lost, **LADDER)
    extend(run_dir, trials=13)
    settings = {**LADDER, "trials": 13}
    search(run_dir, lost, **settings)
    (start,) = lines_of(run_dir, "changed")
    late = [cut for cut in lines_of(run_dir, "failed") if cut > start]
    assert late
    cuts = sorted({start + 5, late[0] + 1, late[0] + 2, lines_of(run_dir, "stopped")[-2], late[-1] + 1})
    repeats(run_dir, lost, cuts, **settings)


def events_of_all(run_dir: Path) -> list[dict[str, Any]]:
    """Thirteen trials without the reference, scored at the first rung."""
    search(run_dir, **{**LADDER, "trials": 13})
    return [record for record in events(run_dir, "reported") if record["trial"] and record["step"] == 5]


def test_a_study_without_a_fraction_cut_between_score_and_end_finishes_the_trial(tmp_path):
    settings = {"trials": 5, "promote": 1, "fraction": 1.0, "method": "random"}
    search(tmp_path / "whole", **settings)
    repeats(tmp_path / "whole", Exact(), lines_of(tmp_path / "whole", "finished")[-2:], **settings)
