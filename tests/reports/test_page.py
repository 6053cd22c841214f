"""The page: what it says, that it needs nothing from outside, that it survives odd and hostile studies."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parsed_page import Page, open_report
from study_directory import write_study

from jaxtune.config.loading import parse_value
from jaxtune.errors import UserError
from jaxtune.reports import write_report
from jaxtune.reports.page import render, view
from jaxtune.reports.records import StudyRecord, TrialRecord, read_study
from jaxtune.search.durations import Durations
from jaxtune.search.outcome import Outcome
from jaxtune.search.status import Recorded
from jaxtune.search.trial import History, Trial, TrialState


def test_headline_says_who_won_and_by_how_much(page: Page, summary: dict[str, Any]) -> None:
    best, baseline = summary["best"], summary["baseline"]
    assert best["trial"] != 0
    assert f"Trial {best['trial']} is the best of 8 trials: validation loss {best['final_score']:.4f}" in page.text
    comparison = page.tables[0]
    assert comparison[1][0] == f"Trial {best['trial']} (winner)"
    assert comparison[1][1].startswith(f"{best['final_score']:.4f}")
    assert comparison[1][2].startswith(f"{best['test_score']:.4f}")
    assert comparison[2][1:] == [f"{baseline['final_score']:.4f}", f"{baseline['test_score']:.4f}"]
    assert comparison[3][2].startswith(f"{summary['untuned']['test_score']:.4f}")
    low, high = summary["test_difference"]["low"], summary["test_difference"]["high"]
    assert f"95 % interval: −{abs(low):.4f} to −{abs(high):.4f}; it excludes zero: the winner is better" in page.text


def test_command_trains_the_winner(page: Page, finished: Path, summary: dict[str, Any]) -> None:
    pattern = r'<code id="command">(.*?)</code>'
    written = re.search(pattern, page.html)
    assert written
    program, command, config, *overrides = shlex.split(written[1])
    assert (program, command, config) == ("jaxtune", "train", str(finished / "config.yaml"))
    values = {key: parse_value(value) for key, value in (word.split("=", 1) for word in overrides)}
    assert values.pop("run_dir") == f"{finished}-winner"
    assert values == summary["best"]["configuration"]
    assert page.all("button", **{"data-copy": "command"})
    assert page.all("button", **{"data-copy": "export"})
    assert f"jaxtune export {finished} --merged {finished}-merged" in page.text


def test_command_of_a_copied_study_names_the_copy(finished: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    summary = json.loads(json.dumps(summary))
    summary["best"]["command"] = f"jaxtune train {finished}/config.yaml run_dir={finished}-winner"
    (copy / "summary.json").write_text(json.dumps(summary))
    text = open_report(copy).text
    assert f"jaxtune train {copy}/config.yaml" in text
    assert f"run_dir={copy}-winner" in text
    assert f"{finished}-winner" not in text


def test_budget_and_agreement(page: Page, summary: dict[str, Any]) -> None:
    budget = summary["budget"]
    saved = 100 * (1 - budget["steps_run"] / budget["steps_if_all_finished"])
    for text in (f"{budget['steps_run']:,}", f"{budget['steps_if_all_finished']:,}", f"saved {saved:.3g} %"):
        assert text in page.text
    assert "Over the 4 finished trials" in page.text
    assert "among the best at the end" not in page.text  # top_k_overlap is null while trials are missing


def test_every_trial_is_in_the_table(page: Page, summary: dict[str, Any]) -> None:
    header, *rows = page.tables[-1]
    assert header[:4] == ["Trial", "Status", "Early score", "Final score"]
    for record, row in zip(summary["trials"], rows, strict=True):
        assert row[0].split()[0] == str(record["id"])
        expected = [record["early_score"], record["final_score"]]
        assert row[2:4] == ["–" if value is None else f"{value:.4f}" for value in expected]
    assert rows[5][1] == "failed: diverged by step 48"
    assert rows[3][1] == "failed: diverged by step 240"
    assert rows[3][2] != "–"  # it was scored before
    assert page.cards()["5"]["title"] == "Trial 5: failed"


def test_figures_have_names_and_tables(page: Page) -> None:
    drawings = page.all("svg", **{"class": "plot"})
    assert len(drawings) == 5 * 2 + 5  # five figures, wide and narrow, and five panels of partial dependence
    assert all(drawing["aria-label"] for drawing in drawings)
    assert len(page.all("details")) == 5 + 5 + 1
    for name in ("Convergence", "Early and final scores", "Configurations", "Training losses", "Validation losses"):
        assert f"{name} as a table" in page.text
    sliders = page.all("g", role="slider")
    assert {slider["aria-label"] for slider in sliders} >= {"Filter optimizer.learning_rate", "Filter early score"}
    assert all(slider["tabindex"] == "0" for slider in sliders)
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    labels = {name for _, a in page.elements for name in (a.get("aria-labelledby") or "").split()}
    assert labels <= set(ids)


def test_marks_stand_where_the_scores_are(page: Page, summary: dict[str, Any]) -> None:
    wide = page.html.split('class="drawing wide">')[1].split("</svg>")[0]
    pattern = r'class="mark (\w+)[^"]*" data-trial="(\d+)" transform="translate\(([\d.]+),([\d.]+)\)"'
    marks = {int(trial): (status, float(x), float(y)) for status, trial, x, y in re.findall(pattern, wide)}
    assert {trial: mark[0] for trial, mark in marks.items()} == {t["id"]: t["status"] for t in summary["trials"]}
    scored = [trial for trial in summary["trials"] if trial["early_score"] is not None]
    by_score = sorted(scored, key=lambda trial: trial["early_score"])
    heights = [marks[trial["id"]][2] for trial in by_score]
    assert heights == sorted(heights, reverse=True)  # a lower loss stands lower on the page
    assert marks[5][2] < min(heights)  # the one without a score stands above the frame
    places = [marks[trial["id"]][1] for trial in summary["trials"]]
    assert places == sorted(places)


def test_page_needs_nothing_from_outside(page: Page) -> None:
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", page.html)
    assert not page.all("link")
    assert not page.all("img")
    assert not page.all("iframe")
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#"), tag  # type: ignore[union-attr]
        assert not any(name.startswith("on") for name in attributes), tag


def test_only_our_script_may_run(page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(page.scripts) == 2
    assert page.all("script")[0]["type"] == "application/json"


HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    space = {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]}, f"a.{HOSTILE}": {"choice": [HOSTILE, "b & <i>"]}}
    base = {"model": {"path": HOSTILE}, "data": {"train": HOSTILE}, "a": {HOSTILE: HOSTILE}}
    page = open_report(write_study(tmp_path / "x<b>", trials=4, promote=1, space=space, name=HOSTILE, base=base))
    assert len(page.scripts) == 2
    assert not page.all("img")
    assert not page.all("b")
    assert HOSTILE in page.text
    assert any(HOSTILE in line for line in page.cards()["0"]["lines"])


def test_running_study_says_what_is_missing(running: Path) -> None:
    page = open_report(running)
    assert "not finished" in page.text
    assert "Trials 4 of 16, 0 finished" in page.text
    assert re.search(r"Trial \d leads after 3 scored trials: validation loss 0\.\d{4} at 20 % of its steps", page.text)
    for words in (
        "The leader has not been trained to the end yet",
        "early and final scores can be compared from two on",
        "The rank agreement is worked out when enough trials are finished",
        "no partial dependence yet",
        "under way",
    ):
        assert words in page.text
    assert not re.search(r"(?<!-)winner", page.text)  # only in the proposed run_dir


def test_first_trial_under_way(tmp_path: Path) -> None:
    page = open_report(write_study(tmp_path / "first", trials=8, stop_at=0))
    assert "No trial has a score yet: 1 trial started, 0 failed" in page.text
    assert not page.all("pre")  # no command while nobody leads
    assert "No trial has been scored yet" in page.text


def test_reference_not_beaten_and_no_test_split(tmp_path: Path) -> None:
    page = open_report(write_study(tmp_path / "s", trials=4, promote=1, reference_gain=1.5, has_test=False))
    assert "The reference configuration was not beaten" in page.text
    assert "the configuration names no test split" in page.text
    assert [row[0] for row in page.tables[0]] == ["", "Reference (winner)"]


def test_shares_are_percentages(tmp_path: Path) -> None:
    directory = write_study(tmp_path / "s", trials=5, promote=2, objective="exact_match")
    page = open_report(directory)
    summary = json.loads((directory / "summary.json").read_text())
    assert f"exact match {100 * summary['best']['final_score']:.1f} %" in page.text
    assert "higher is better" in page.text
    assert re.search(r"interval: \+\d+\.\d points to \+\d+\.\d points", page.text)


def test_interval_that_includes_zero_is_said_so(finished: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    changed = {**summary, "test_difference": {"low": -0.01, "high": 0.02, "confidence": 0.9}}
    (copy / "summary.json").write_text(json.dumps(changed))
    text = open_report(copy).text
    assert "90 % interval: −0.0100 to +0.0200; it includes zero" in text
    assert "cannot be told apart" in text


def test_overlap_is_shown_when_all_trials_are_finished(finished: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    agreement = {"spearman": 0.91, "kendall": 0.8, "top_k": 5, "top_k_overlap": 4, "finished": 8, "basis": "all"}
    (copy / "summary.json").write_text(json.dumps({**summary, "rank_agreement": agreement}))
    text = open_report(copy).text
    assert "4 of 5" in text
    assert "Over all 8 trials" in text


def test_flat_surrogate_and_values_that_are_not_finite(finished: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    changed = json.loads(json.dumps(summary))
    changed["importance"] = dict.fromkeys(changed["importance"], 0.0)
    changed["partial_dependence"][0]["mean"][0] = None
    changed["partial_dependence"][1]["mean"] = [None] * len(changed["partial_dependence"][1]["mean"])
    (copy / "summary.json").write_text(json.dumps(changed))
    page = open_report(copy)
    assert "it saw no effect of any key" in page.text
    assert len(page.all("figcaption")) == 4


def test_old_page_is_replaced_and_nothing_is_left(finished: Path) -> None:
    (finished / "report.html").write_text("old")
    assert write_report(str(finished)) == finished / "report.html"
    assert "old" not in (finished / "report.html").read_text()[:10]
    assert [path.name for path in finished.glob(".report-*")] == []


def trial(number: int, early: float | None, final: float | None, *, status: str) -> TrialRecord:
    return TrialRecord(
        id=number, configuration={"a.rate": 10.0 ** -(number % 4), "b.kind": "xyz"[number % 3]}, status=status,
        training=status == "running", early_score=early, early_error=0.1, final_score=final, reason="", steps=1,
        total_steps=5, seconds=0.0,
        curve=[(1, early), (2, None), (3, final)], validation=[(1, early), (5, final)],
    )  # fmt: skip


SCORE = st.one_of(st.none(), st.sampled_from([0.0, 1.0, -1.0, 1e-12, 1e12]), st.floats(-1e6, 1e6))


@settings(max_examples=30, deadline=None)
@example([(66.0, 3.65e-307), (1e-300, 1.0), (1e300, 2.0)], "min")
@given(st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=6), st.sampled_from(["min", "max"]))
def test_any_scores_can_be_drawn(scores: list[tuple[float | None, float | None]], direction: str) -> None:
    trials = []
    for number, (early, final) in enumerate(scores):
        status = "failed" if early is None else ("scored" if final is None else "finished")
        trials.append(trial(number, early, final if early is not None else None, status=status))
    header = {
        "objective": {"name": "loss", "direction": direction}, "fraction": 0.2, "trials": 6, "promote": 2,
        "space": {"a.rate": {"log_uniform": [1e-3, 1.0]}, "b.kind": {"choice": ["x", "y"]}},
    }  # fmt: skip
    history = History()
    for one in trials:
        state = TrialState(Trial(one.id, one.configuration, Path()))
        state.early, state.final = (
            None if score is None else Outcome(score, None, 1, 0.0) for score in (one.early_score, one.final_score)
        )
        history.trials[one.id] = state
    recorded = Recorded(Path("runs/s"), header, [], history, ended=False)
    study = StudyRecord(
        recorded=recorded, name="s", trials=trials, summary={}, durations=Durations(3.0, 3.0), written=1.7e9
    )
    page = Page(render(view(study)))
    assert not re.search(r'(?<=[ ",(])(nan|inf)(?=[ ",)])', page.html)
    assert len(page.tables[-1]) == len(scores) + 1
    later = dataclasses.replace(study, trials=[])
    assert "No trial has been started yet" in Page(render(view(later))).text


def test_directory_without_a_study_names_the_nearest(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such directory; did you mean .*finished"):
        write_report(finished.parent / "finishd")
    with pytest.raises(UserError, match="no study here"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="a single run, not a study"):
        write_report(tmp_path)


def test_damaged_files_are_named(running: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(running, tmp_path / "copy")
    (copy / "summary.json").write_text('{"best": ')
    with pytest.raises(UserError, match=r"summary\.json: not valid JSON"):
        write_report(copy)
    (copy / "summary.json").write_text("[1]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        write_report(copy)
    (copy / "summary.json").unlink()
    (copy / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML"):
        write_report(copy)
    (copy / "config.yaml").unlink()
    with (copy / "trials.jsonl").open("a") as journal:
        journal.write('{"event": "scor')  # a kill in the middle of a write
    assert write_report(copy).is_file()
    (copy / "trials.jsonl").write_text("")
    with pytest.raises(UserError, match=r"trials\.jsonl: the journal is empty; run the search again"):
        write_report(copy)


def test_long_curves_are_thinned_to_their_ends(running: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(running, tmp_path / "copy")
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 5001)]
    (copy / "trials" / "001" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5000, "validation_loss": 1}']))
    curve = read_study(copy).trials[1].curve
    assert len(curve) < 300
    assert curve[0] == (1, 1.0)
    assert curve[-1] == (5000, 1 / 5000)
    assert all(loss is not None and math.isclose(loss, 1 / step) for step, loss in curve)


def test_trials_that_were_stopped_on_the_ladder_are_told_as_such(tmp_path):
    directory = write_study(tmp_path / "ladder", trials=8, promote=2, ladder=(0.1,))
    text = write_report(directory).read_text(encoding="utf-8")
    stopped = sum(json.loads(line)["event"] == "stopped" for line in (directory / "trials.jsonl").open())
    assert stopped >= 2
    assert text.count("stopped before") >= stopped
