"""Where a study stands, read while it runs and after; its trials as rows."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from synthetic import REFERENCE, SPACE, SyntheticRunner, interrupt_at, search_config

from jaxtune.cli.study.status import text
from jaxtune.errors import UserError
from jaxtune.files import lock_holder
from jaxtune.reports.headline import find_winner
from jaxtune.reports.records import read_study
from jaxtune.search import Study, trials
from jaxtune.search.details import trial_details
from jaxtune.search.directory import find_studies
from jaxtune.search.journal import read_journal
from jaxtune.search.status import read_status

BASE = {"name": "test", "optimizer": {"warmup": 0.1}}


def study(run_dir, runner, **changes) -> Study:
    return Study(run_dir, search_config(**changes), runner, reference=REFERENCE, base=BASE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    summary = study(run_dir, SyntheticRunner(divergence=3e-3)).run()
    assert summary is not None
    return run_dir, summary


def test_a_finished_study(finished):
    run_dir, summary = finished
    status = read_status(run_dir)
    assert (status.phase, status.holder, status.planned, status.promote) == ("finished", None, 8, 3)
    assert status.best == summary["best"]["trial"]
    assert status.steps == summary["budget"]["steps_run"]
    assert status.seconds == pytest.approx(summary["budget"]["seconds"])
    by_number = {trial["id"]: trial for trial in summary["trials"]}
    for trial in status.trials:
        known = by_number[trial.trial]
        assert (trial.state, trial.early_score, trial.final_score) == (
            known["status"],
            known["early_score"],
            known["final_score"],
        )
    assert status.count("finished", "scored", "failed") == 8
    json.dumps(status.as_dict(), allow_nan=False)


def test_a_study_seen_from_inside_a_trial(tmp_path):
    seen = []

    def look(trial, until):
        if (trial.id, until) in ((0, 10), (3, 10), (0, 50)):
            (trial.directory / "config.yaml").write_text("train: {steps: 50}\n")
            line = json.dumps({"step": until - 3, "loss": 1.0})
            (trial.directory / "metrics.jsonl").write_text(line + '\n{"step": torn')
            seen.append(read_status(tmp_path))

    runner = SyntheticRunner(divergence=1.0)
    runner.before = look
    assert study(tmp_path, runner).run() is not None
    first, early, late = seen
    assert first.best is None
    assert first.holder is not None
    assert first.holder.process == os.getpid()
    assert first.holder.here
    assert early.phase == "scoring"
    assert early.count("scored") == 3
    (under_way,) = (trial for trial in early.trials if trial.state == "training")
    assert (under_way.trial, under_way.step, under_way.until) == (3, 7, 10)
    assert early.steps == 37
    assert late.phase == "finishing"
    assert (late.trials[0].state, late.trials[0].step, late.trials[0].until) == ("finishing", 47, 50)
    assert late.best is not None
    after = read_status(tmp_path)
    assert after.holder is None
    # A look from outside takes nothing away: the next process gets the lock at once.
    assert lock_holder(tmp_path / "study.lock") is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_reference_does_not_lead_because_it_is_finished_first(tmp_path, sign):
    """While the others are being finished they count with their early scores; at the end the final ones decide."""
    seen: list[tuple[int | None, int | None]] = []

    def look(trial, until):
        if until == 50:
            shown = find_winner(read_study(tmp_path))
            seen.append((read_status(tmp_path).best, None if shown is None else shown.trial.id))

    runner = SyntheticRunner(sign=sign, divergence=3e-3)
    runner.before = look
    direction = "min" if sign > 0 else "max"
    search = search_config(objective="loss" if sign > 0 else "f1")
    summary = Study(tmp_path, search, runner, direction=direction, reference=REFERENCE, base=BASE).run()
    assert summary is not None
    scores = {trial["id"]: trial["early_score"] for trial in summary["trials"]}
    early = {number: sign * score for number, score in scores.items() if score is not None}
    first = min(early, key=early.__getitem__)
    assert first != 0
    # Trial 0 is finished when the second look is taken, with a score that no other has at the fraction.
    assert sign * summary["baseline"]["final_score"] < early[first]
    assert seen[1] == (first, first)
    assert all(one == other for one, other in seen)
    shown = find_winner(read_study(tmp_path))
    assert shown is not None
    assert (read_status(tmp_path).best, shown.trial.id) == (summary["best"]["trial"],) * 2


def test_a_trial_at_a_rung_waits_whoever_is_asked(tmp_path):
    """The first trials are at the rung, and the last is on its way; later one goes on to the fraction."""
    looks = []

    def look(trial, until):
        (trial.directory / "config.yaml").write_text("train: {steps: 50}\n")
        if (trial.id, until) == (2, 5) or until == 10:
            (trial.directory / "metrics.jsonl").write_text(json.dumps({"step": until - 1, "loss": 1.0}) + "\n")
            looks.append((read_status(tmp_path).trials, read_study(tmp_path).trials))
        (trial.directory / "metrics.jsonl").write_text(json.dumps({"step": until, "loss": 1.0}) + "\n")

    runner = SyntheticRunner(divergence=1.0)
    runner.before = look
    assert study(tmp_path, runner, trials=3, promote=1, initial=3, ladder=[0.1]).run() is not None
    (told, shown), (later, drawn) = looks[:2]
    status = read_status(tmp_path)
    assert (status.as_dict()["ladder"], status.as_dict()["fraction"]) == ([0.1], 0.2)
    by_rung = [record for record in read_journal(tmp_path) if record["event"] == "reported"]
    assert {trial.trial: trial.rungs for trial in status.trials} == {
        record["trial"]: {5: record["score"]} for record in by_rung
    }
    page = text(status)
    assert "the better half goes on at each rung, 0.1 of the steps, and is scored at 0.2" in page
    assert re.search(rf"{by_rung[0]['score']:.4f}".rstrip("0"), page.split("at 0.1", 1)[1])
    assert [(trial.state, trial.step, trial.until) for trial in told] == [
        ("waiting", 5, 10), ("waiting", 5, 10), ("training", 4, 5)
    ]  # fmt: skip
    assert [trial.status for trial in shown] == ["waiting", "waiting", "running"]
    assert (later[0].state, later[0].step, later[0].until) == ("training", 9, 10)
    assert drawn[0].status == "running"


def test_a_stopped_study_has_a_trial_that_waits(tmp_path):
    runner = SyntheticRunner()
    runner.before = interrupt_at(2, 10)
    assert study(tmp_path, runner).run() is None
    (tmp_path / "trials" / "002" / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    status = read_status(tmp_path)
    assert (status.phase, status.holder) == ("scoring", None)
    assert [trial.state for trial in status.trials] == ["scored", "scored", "paused"]
    assert status.trials[2].step == 4


def test_a_clock_that_jumps_changes_nothing_but_the_times(finished, tmp_path, monkeypatch):
    """Back by a year in the middle, and forward by ten at the end."""
    clock = time.time
    calls = iter(range(10_000))
    monkeypatch.setattr(time, "time", lambda: clock() + (0, -3e7, 3e8)[min(next(calls) // 8, 2)])
    summary = study(tmp_path, SyntheticRunner(divergence=3e-3)).run()
    monkeypatch.setattr(time, "time", clock)
    assert summary is not None
    assert {**summary, "budget": 0} == {**finished[1], "budget": 0}
    times = [json.loads(line)["time"] for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert times != sorted(times)
    assert times[-1] > clock() + 1e8
    shown = read_status(tmp_path).as_dict()
    assert shown["idle_seconds"] == 0
    assert shown["seconds"] == pytest.approx(read_status(finished[0]).seconds)


def test_all_diverged_is_a_phase(tmp_path):
    with pytest.raises(UserError, match="all 8 trials diverged"):
        study(tmp_path, SyntheticRunner(divergence=0.0)).run()
    status = read_status(tmp_path)
    assert (status.phase, status.best) == ("failed", None)


def test_trials_go_into_pandas_in_one_line(finished):
    pandas = pytest.importorskip("pandas")
    run_dir, summary = finished
    frame = pandas.DataFrame(trials(run_dir))
    assert len(frame) == 8
    assert list(frame.columns[:3]) == ["trial", "status", "source"]
    assert list(frame.columns[3:7]) == list(SPACE)
    assert frame["final_score"].dtype == float
    best = frame.sort_values("final_score").iloc[0]
    assert best["trial"] == summary["best"]["trial"]
    assert best["optimizer.learning_rate"] == summary["best"]["configuration"]["optimizer.learning_rate"]
    assert best["test_score"] == summary["best"]["test_score"]
    assert frame["steps"].sum() == summary["budget"]["steps_run"]
    failed = frame[frame["status"] == "failed"]
    assert len(failed) >= 1
    assert failed["early_score"].isna().all()
    assert frame.loc[frame["status"] == "finished", "final.validation_loss"].notna().all()


def test_the_example_of_the_page_runs(finished, capsys):
    pytest.importorskip("pandas")
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "jaxtune.trials" in block
    )
    exec(code.replace("runs/quickstart", str(finished[0])), {})
    first = capsys.readouterr().out.splitlines()[1].split()
    assert int(first[1]) == finished[1]["best"]["trial"]


def test_the_reference_has_the_searched_values_of_the_configuration(tmp_path):
    space = {**SPACE, "optimizer.warmup": {"uniform": (0.0, 0.3)}}
    runner = SyntheticRunner()
    runner.before = interrupt_at(1, 10)
    assert study(tmp_path, runner, space=space).run() is None
    rows = trials(tmp_path)
    assert rows[0]["optimizer.warmup"] == 0.1
    assert rows[0].keys() == rows[1].keys()
    assert rows[1]["early_score"] is None


def test_one_trial_in_full(finished):
    run_dir, summary = finished
    number = summary["best"]["trial"]
    details = trial_details(run_dir, number)
    assert details["configuration"] == summary["best"]["configuration"]
    assert details["final"]["score"] == summary["best"]["final_score"]
    assert details["test"]["score"] == summary["best"]["test_score"]
    assert details["promoted"]["rank"] >= 1
    assert f"run_dir={run_dir}-trial-{number:03d}" in details["command"]
    failed = next(trial["id"] for trial in summary["trials"] if trial["status"] == "failed")
    assert trial_details(run_dir, failed)["early"]["score"] is None
    for wrong in ("8", "-1", "best"):
        with pytest.raises(UserError, match=f"trial {wrong}: no such trial; .* has trials 0 to 7"):
            trial_details(run_dir, wrong)


def test_studies_are_found_below_a_directory(finished, tmp_path):
    run_dir, _ = finished
    assert find_studies(run_dir.parent) == [run_dir]
    assert find_studies(run_dir) == [run_dir]
    assert find_studies(tmp_path) == []
    with pytest.raises(UserError, match="no such directory"):
        find_studies(tmp_path / "none")
    with pytest.raises(UserError, match=f"did you mean '{run_dir}'"):
        read_status(run_dir.parent / "onee")
