"""Finishing in rungs: twice as many go on to a rung, the better half of them to the end; killed, extended, told."""

from __future__ import annotations

import json
import math

import pytest
from synthetic import REFERENCE, SyntheticRunner, records, search_config

from jaxtune.cli.search import _rungs
from jaxtune.cli.study.status import text
from jaxtune.errors import UserError
from jaxtune.reports.page import facts, score_columns, sort_key, trial_row
from jaxtune.reports.progress import progress, steps_left
from jaxtune.reports.records import read_study
from jaxtune.search import Outcome, Study, StudySummary
from jaxtune.search.details import trial_details
from jaxtune.search.journal import Journal
from jaxtune.search.milestones import Milestones, milestones
from jaxtune.search.status import read_status
from jaxtune.search.table import trials
from tests.told_types import check_types

# 4 are promoted to 20 of 50 steps, 2 of them finished: 4 × 10 + 2 × 30 = 100 steps, of 3 × 40 = 120.
FINISH = {"method": "random", "trials": 9, "promote": 3, "finish": [0.4, 1.0]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is put on the disk for good, nothing is fitted, and no summary explains anything."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("jaxtune.search.surrogate.Surrogate.fit", lambda self, observations: None)


def study(run_dir, runner=None, **changes) -> Study:
    search = search_config(**{**FINISH, **changes})
    return Study(run_dir, search, runner or SyntheticRunner(), reference=REFERENCE, base={"name": "test"})


def of(events, name, **wanted):
    """The trials of some records, in order."""
    return [one["trial"] for one in events if one["event"] == name and wanted.items() <= one.items()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finishing") / "whole"
    runner = SyntheticRunner(capacity=2)
    summary = study(run_dir, runner).run()
    assert summary is not None
    return run_dir, runner, summary


def test_the_better_half_at_the_rung_is_finished(whole):
    run_dir, runner, summary = whole
    told = records(run_dir)
    at_rung = {one["trial"]: one["score"] for one in told if one["event"] == "reported"}
    first, second = of(told, "promoted", leg=0), of(told, "promoted", leg=1)
    assert sorted(at_rung) == sorted([0, *first])
    assert (len(first), len(second)) == (4, 2)
    assert second == sorted(first, key=at_rung.__getitem__)[:2], "by the scores themselves"
    early = {trial["id"]: trial["early_score"] for trial in summary["trials"] if trial["early_score"] is not None}
    assert set(first) == set(sorted(early.keys() - {0}, key=early.__getitem__)[:4])
    assert sorted(trial for trial, until in runner.calls if until == 50) == sorted([0, *second])
    assert summary["best"]["trial"] in {0, *second}
    assert summary["budget"]["steps_run"] == sum(
        max(until for one, until in runner.calls if one == number) for number in range(9)
    )
    # A trial that ended at the rung has no final score: what is known of ranks is of survivors alone.
    agreement = summary["rank_agreement"]
    assert (agreement["finished"], agreement["basis"], agreement["top_k_overlap"]) == (3, "survivors", None)
    statuses = {trial["id"]: trial["status"] for trial in summary["trials"]}
    assert all(statuses[number] == ("finished" if number in second else "scored") for number in first)


def test_summary_status_and_page_tell_the_rungs(whole):
    run_dir, _, summary = whole
    check_types(StudySummary, summary)
    assert json.loads((run_dir / "summary.json").read_text())["finish"] == summary.finish
    told = records(run_dir)
    assert [(rung["share"], rung["step"], rung["promoted"]) for rung in summary.finish] == [(0.4, 20, 4), (1.0, 50, 2)]
    assert _rungs(summary) == ["finished in rungs: 5 trials at 40% (step 20), 3 trials at 100% (step 50) of the steps"]
    for rung, event in zip(summary.finish, ("reported", "finished"), strict=True):
        scores = {one["trial"]: one["score"] for one in told if one["event"] == event}
        assert {one["trial"]: one["score"] for one in rung["trials"]} == scores
    status = read_status(run_dir)
    assert status.as_dict()["finish"] == [0.4, 1.0]
    assert status.steps == summary["budget"]["steps_run"]
    assert "the best 4 go to 0.4 of the steps (step 20), the best 2 go to the end (step 50)" in text(status)
    assert status.as_dict()["length"] == 50
    assert "at 0.4" in text(status)
    left = next(trial for trial in status.trials if trial.state == "scored" and trial.rungs)
    assert (left.step, left.until) == (20, 20)
    rows = {row["trial"]: row["rung.20"] for row in trials(run_dir)}
    at_rung = {one["trial"]: one["score"] for one in summary.finish[0]["trials"]}
    assert rows == {number: at_rung.get(number) for number in rows}
    assert [one["score"] for one in trial_details(run_dir, left.trial)["rungs"]] == [at_rung[left.trial]]
    record = read_study(run_dir)
    names = [name for name, _ in score_columns(record)]
    assert names == ["Early score", "At step 20", "Final score"]
    for trial in record.trials:
        assert trial_row(record, trial, None)["scores"][1][1] == sort_key(at_rung.get(trial.id))
    assert dict(facts(record))["Going on"].split() == ["4", "to", "40", "%,", "2", "to", "100", "%"]
    assert steps_left(record, 50) == 0


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_killed_study_goes_on_exactly(tmp_path, capacity):
    runner = SyntheticRunner(capacity=capacity)
    assert study(tmp_path / "whole", runner).run() is not None
    whole = records(tmp_path / "whole")
    lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines(keepends=True)
    begin = next(place for place, one in enumerate(whole) if one["event"] == "promoted")
    for cut in range(begin + capacity - 1, len(lines) + 1, 3):
        directory = tmp_path / str(cut)
        directory.mkdir()
        (directory / "trials.jsonl").write_text("".join(lines[:cut]))
        summary = study(directory, SyntheticRunner(capacity=capacity)).run()
        assert summary is not None
        again = records(directory)
        assert again[:cut] == whole[:cut]
        assert of(again, "promoted") == of(whole, "promoted")
        assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, whole)), cut


def test_progress_counts_what_is_to_come(tmp_path):
    seen = []
    runner = SyntheticRunner(divergence=1.0)

    def look(trial, until):
        if until > 10:
            record = read_study(tmp_path)
            seen.append((sum(one.steps for one in record.trials), steps_left(record, 50), progress(record).finished))
            assert read_status(tmp_path).phase == "finishing"

    runner.before = look
    summary = study(tmp_path, runner).run()
    assert summary is not None
    whole = summary["budget"]["steps_run"]
    assert whole == 9 * 10 + 5 * 10 + 3 * 30
    assert [run + left for run, left, _ in seen] == [whole] * 8
    assert seen[-1][2] == "2 of 3"


class Late(SyntheticRunner):
    """Some trials diverge on their way to a step.

    Args:
      lost: trial and step.
    """

    def __init__(self, *lost):
        super().__init__()
        self.lost = lost

    def run(self, trial, until):
        outcome = super().run(trial, until)
        lost = (trial.id, until) in self.lost
        return Outcome(math.nan, None, until - 1, 0.1, diverged=True) if lost else outcome


def test_the_next_in_line_replaces_one_that_diverges(whole, tmp_path):
    before = records(whole[0])
    on_the_way, at_the_end = of(before, "promoted", leg=0)[1], of(before, "promoted", leg=1)[0]
    lost = ((on_the_way, 20), (at_the_end, 50)) if on_the_way != at_the_end else ((on_the_way, 20),)
    summary = study(tmp_path, Late(*lost)).run()
    assert summary is not None
    told = records(tmp_path)
    assert len(of(told, "reported")) == 5, "four others and the reference"
    assert len(of(told, "finished")) == 3
    assert {trial["id"] for trial in summary["trials"] if trial["status"] == "failed"} >= {number for number, _ in lost}
    assert study(tmp_path, Late(*lost)).run() == summary
    assert records(tmp_path) == told


def test_an_extended_study_ranks_its_rungs_anew(whole, tmp_path):
    run_dir, _, first = whole
    (tmp_path / "trials.jsonl").write_bytes((run_dir / "trials.jsonl").read_bytes())
    before = records(tmp_path)
    with Journal(tmp_path) as journal:
        journal.append("changed", trials=13, promote=6)
    runner = SyntheticRunner(capacity=2)
    summary = study(tmp_path, runner, trials=13, promote=6).run()
    assert summary is not None
    told = records(tmp_path)
    assert told[: len(before)] == before
    final = {trial["id"]: trial["final_score"] for trial in summary["trials"] if trial["final_score"] is not None}
    for trial in first["trials"]:
        if trial["final_score"] is not None:
            assert final[trial["id"]] == trial["final_score"]
    trained = [call for call in runner.calls if call[1] > 10]
    assert len(trained) == len(set(trained))
    assert not set(trained) & {(number, 50) for number in first_finished(first)}
    at_rung = {one["trial"]: one["score"] for one in told if one["event"] == "reported" and one["trial"]}
    assert len(at_rung) >= 8
    assert set(sorted(at_rung, key=at_rung.__getitem__)[:4]) <= final.keys()


def first_finished(summary):
    return {trial["id"] for trial in summary["trials"] if trial["status"] == "finished"}


@pytest.mark.parametrize("finish", [[0.4], [], [0.6, 0.4, 1.0], [0.2, 1.0], [0.4, 0.4, 1.0], [0.1, 1.0]])
def test_rungs_that_do_not_ascend_to_the_end_are_refused(finish):
    with pytest.raises(ValueError, match=r"must ascend, above fraction 0\.2, and end in 1\.0"):
        search_config(finish=finish)


def test_rungs_that_fall_on_one_step_are_refused(tmp_path):
    short = SyntheticRunner()
    short.steps = 10
    with pytest.raises(UserError, match=r"search\.finish: 0\.24 of 10 steps is step 2, as is .* 0\.2 of"):
        study(tmp_path / "1", short, finish=[0.24, 1.0]).run()
    with pytest.raises(UserError, match=r"search\.finish: 1 of 10 steps is step 10, as is .* 0\.97 of"):
        study(tmp_path / "2", short, finish=[0.97, 1.0]).run()
    assert milestones(search_config(finish=[0.5, 0.74, 1.0]), 10) == Milestones((), 2, 10, (5, 7))
