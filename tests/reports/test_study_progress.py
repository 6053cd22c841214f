"""What a study under way is said to be doing, and about how long it will take; trials may train at the same time."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parsed_page import Page, open_report
from study_directory import STEPS

from jaxtune.cli.common import time_taken
from jaxtune.cli.study.status import text as status_text
from jaxtune.reports.formatting import SPACE, roughly
from jaxtune.reports.headline import budget, find_winner
from jaxtune.reports.progress import progress, steps_left
from jaxtune.reports.records import StudyRecord, read_study
from jaxtune.search.durations import covered
from jaxtune.search.status import read_status

EARLY = STEPS // 5
ZERO = 1_700_000_000.0


@pytest.fixture
def population(running: Path, tmp_path: Path) -> Path:
    """Trials 0 to 2 trained together and are scored; 3 to 5 train and 6 waits at ``ZERO + 100``."""
    directory = shutil.copytree(running, tmp_path / "population")
    file = directory / "trials.jsonl"
    records = {(r["event"], r.get("trial")): r for r in map(json.loads, file.read_text().splitlines())}
    proposed, scored = records["proposed", 1], [records["scored", trial] for trial in range(3)]
    journal = [records["study", None] | {"time": ZERO, "population": 3}]
    journal += [proposed | {"trial": trial, "time": ZERO + 1} for trial in range(7)]
    journal += [record | {"time": ZERO + 50 + index, "seconds": 14.0} for index, record in enumerate(scored)]
    file.write_text("".join(json.dumps(record) + "\n" for record in journal))
    for trial in range(6):
        folder = directory / "trials" / f"{trial:03d}"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text("")
        began = ZERO + 10 if trial < 3 else ZERO + 60
        os.utime(folder / "config.yaml", (began, began))
        if trial in (4, 5):
            lines = [{"step": step, "loss": 2.0 - 0.01 * step} for step in range(2, 10 * trial + 1, 2)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "metrics.jsonl").touch()
        last = ZERO + 45 if trial < 3 else ZERO + 96 + trial - 1
        os.utime(folder / "metrics.jsonl", (last, last))
    return directory


def test_several_trials_train_at_the_same_time(population: Path) -> None:
    study = read_study(population)
    assert [trial.status for trial in study.trials] == ["scored"] * 3 + ["running"] * 3 + ["waiting"]
    assert [trial.id for trial in study.trials if trial.training] == [3, 4, 5]
    # From 8 (50 less three times 14) to 52 the first three, from 60 to 100 the others.
    assert study.durations.elapsed == pytest.approx(44 + 40, abs=0.01)
    # Their shares of it add up to what they took; what is under way comes on top.
    assert study.durations.work == pytest.approx(3 * 14 + 40, abs=0.01)
    assert study.written == pytest.approx(ZERO + 100)


def test_time_left_is_steps_left_at_the_pace_so_far(population: Path) -> None:
    study = read_study(population)
    run = 3 * EARLY + 40 + 40 + 50
    # 16 trials to the fraction, the reference and four others to the end.
    whole = 16 * EARLY + 5 * (STEPS - EARLY)
    assert steps_left(study, STEPS) == whole - run
    told = progress(study)
    assert told.left == roughly((whole - run) * 84 / run)
    assert told.share == round(100 * run / whole, 1)
    assert (told.scored, told.finished) == ("3 of 16", "0 of 5")
    assert [(work.trial, work.step, work.until) for work in told.at_work][1:] == [(4, 40, EARLY), (5, 50, EARLY)]
    assert [work.loss for work in told.at_work][1:] == ["1.6", "1.5"]
    assert told.at_work[2].share == 62.5


def test_page_lists_all_of_them(population: Path) -> None:
    page = open_report(population)
    assert [row[0] for row in page.tables[0][1:]] == ["3", "4", "5"]
    assert page.tables[-1][7][1] == "waiting"
    assert "step 50" in page.cards()["5"]["title"]


def test_reference_that_is_being_finished(finished: Path, tmp_path: Path) -> None:
    """It gets no ``promoted`` record; that it goes on shows in its own files."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "summary.json").unlink()
    lines = (copy / "trials.jsonl").read_text().splitlines(keepends=True)
    cut = next(index for index, line in enumerate(lines) if json.loads(line)["event"] == "finished")
    (copy / "trials.jsonl").write_text("".join(lines[:cut]))
    old = json.loads(lines[1])["time"] - 100
    for folder in (copy / "trials").iterdir():
        os.utime(folder / "metrics.jsonl", (old, old))
    assert not [trial.id for trial in read_study(copy).trials if trial.training]
    os.utime(copy / "trials" / "000" / "metrics.jsonl", (time.time(), time.time()))
    study = read_study(copy)
    assert [trial.id for trial in study.trials if trial.training] == [0]
    assert study.trials[0].status == "promoted"
    (work,) = progress(study).at_work
    assert (work.doing, work.until) == ("to the end", STEPS)


def test_leader_is_no_winner_while_others_are_being_finished(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "summary.json").unlink()
    lines = (copy / "trials.jsonl").read_text().splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if json.loads(line)["event"] == "finished")
    (copy / "trials.jsonl").write_text("".join(lines[: first + 1]))
    study = read_study(copy)
    (done,) = study.finished
    assert done.reference
    assert done.final_score is not None
    page = open_report(copy)
    assert not [row for table in page.tables for row in table if "winner" in row[0]]
    ahead = [json.loads(line) for line in lines[: first + 1]]
    for record in ahead:
        if (record["event"], record.get("trial")) == ("scored", 1):
            record["score"] = done.final_score - 0.1
    (copy / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ahead))
    leader = find_winner(read_study(copy))
    assert leader is not None
    assert (leader.trial.id, leader.final, leader.decided) == (1, False, False)
    # Whoever asks is told the same.
    assert read_status(copy).best == 1


def test_nothing_is_promised_before_a_trial_is_scored(population: Path) -> None:
    study = read_study(population)
    fresh = [dataclasses.replace(t, status="running", early_score=None, seconds=None) for t in study.trials[3:5]]
    assert progress(dataclasses.replace(study, trials=fresh)).left == ""
    nothing = dataclasses.replace(study.recorded, header={**study.recorded.header, "config": {}})
    length = [dataclasses.replace(trial, total_steps=None) for trial in fresh]
    unknown = dataclasses.replace(study, recorded=nothing, trials=length)
    told = progress(unknown)
    assert (told.share, told.left, told.at_work[0].until) == (None, "", None)
    assert progress(dataclasses.replace(study, trials=[])).at_work == []


def _after(study: StudyRecord, **counts: int) -> StudyRecord:
    """The study with so many trials of each status, all of the early steps or all steps run."""
    trials = []
    for status, count in counts.items():
        for _ in range(count):
            steps = STEPS if status == "finished" else (0 if status in ("waiting", "running") else EARLY)
            trials.append(
                dataclasses.replace(study.trials[1], id=len(trials), status=status, steps=steps, total_steps=STEPS)
            )
    return dataclasses.replace(study, trials=trials)


@pytest.mark.parametrize(
    ("counts", "left"),
    [
        ({}, 16 * EARLY + 5 * (STEPS - EARLY)),
        ({"scored": 16}, 5 * (STEPS - EARLY)),
        ({"finished": 1, "scored": 14, "waiting": 1}, EARLY + 4 * (STEPS - EARLY)),
        ({"finished": 2, "promoted": 3, "scored": 11}, 3 * (STEPS - EARLY)),
        ({"finished": 5, "scored": 11}, 0),
        ({"failed": 1, "scored": 15}, 4 * (STEPS - EARLY)),  # a reference that diverged is not finished
        ({"finished": 4, "failed": 2, "scored": 10}, STEPS - EARLY),  # the next in line replaces one that diverged
    ],
)
def test_steps_left(running: Path, counts: dict[str, int], left: int) -> None:
    assert steps_left(_after(read_study(running), **counts), STEPS) == left


def test_a_pause_of_the_study_is_no_time_used(population: Path) -> None:
    file = population / "trials.jsonl"
    study, *others = map(json.loads, file.read_text().splitlines())
    # The three were proposed, the study was stopped, and an hour later it went on.
    late = [record | {"time": record["time"] + 3600} if record["event"] == "scored" else record for record in others]
    shutil.rmtree(population / "trials")
    file.write_text("".join(json.dumps(record) + "\n" for record in [study, *late]))
    assert read_study(population).durations.elapsed == pytest.approx(44)
    # Alone in the population, a trial's share is all of the time since it was proposed.
    first, scored = [record for record in others if record["trial"] == 0]
    file.write_text("".join(json.dumps(record) + "\n" for record in [study, first, scored | {"seconds": 40.0}]))
    assert read_study(population).durations.elapsed == pytest.approx(50 - 1)


def test_everyone_tells_the_same_time(population: Path, finished: Path) -> None:
    """Trials that train side by side take longer by the clock than their shares, and so did the page."""
    study = read_study(population)
    assert study.durations.work < study.durations.elapsed
    told = {directory: time_taken(read_status(directory).seconds) for directory in (population, finished)}
    assert f"in {told[population]} of training and scoring" in status_text(read_status(population))
    assert progress(study).used.replace(SPACE, " ") == told[population] == "1 min 22 s"
    # An ended study: status, page and summary.
    shown = budget(read_study(finished))
    summary = json.loads((finished / "summary.json").read_text())
    assert shown is not None
    assert shown["seconds"].replace(SPACE, " ") == told[finished] == time_taken(summary["budget"]["seconds"])


def test_an_ended_study_in_a_population_has_the_time_of_its_summary(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    file = copy / "trials.jsonl"
    study, *others = map(json.loads, file.read_text().splitlines())
    apart = [record | {"time": ZERO + 100 * place} for place, record in enumerate(others)]
    head = study | {"population": 4, "time": ZERO}
    file.write_text("".join(json.dumps(record) + "\n" for record in [head, *apart]))
    durations, summary = read_study(copy).durations, json.loads((copy / "summary.json").read_text())
    assert durations.work == pytest.approx(summary["budget"]["seconds"])
    assert durations.elapsed > durations.work
    assert read_status(copy).seconds == durations.work


INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8)


@given(INTERVALS)
def test_covered_counts_each_second_once(intervals: list[tuple[int, int]]) -> None:
    pairs = [(float(start), float(start + length)) for start, length in intervals]
    assert covered(pairs) == len({second for start, length in intervals for second in range(start, start + length)})


def test_validation_losses_are_drawn(finished: Path, page: Page) -> None:
    file = finished / "trials" / "000" / "metrics.jsonl"
    records: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    study = read_study(finished)
    assert study.trials[0].validation == expected
    assert len(expected) == 5
    # Each is a dot, in the wide and in the narrow drawing.
    dots = page.all("circle", **{"class": "evaluation"})
    assert len(dots) == 2 * sum(len(trial.validation) for trial in study.trials)


def test_validation_losses_of_the_journal_alone(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    lines = [json.loads(line) for line in (copy / "trials.jsonl").read_text().splitlines()]
    for record in lines:
        if record["event"] in ("scored", "finished") and record["trial"] == 0:
            record["metrics"]["validation_loss"] = record["step"] / 1000
    (copy / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    shutil.rmtree(copy / "trials" / "000")
    assert read_study(copy).trials[0].validation == [(EARLY, EARLY / 1000), (STEPS, STEPS / 1000)]
    assert read_study(copy).trials[0].curve == []
