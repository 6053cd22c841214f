"""``jaxtune study transfer`` on a tiny task."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxtune.cli import main
from jaxtune.config.metrics import Goal
from jaxtune.experiments.transfer import _choice
from jaxtune.search import read_journal
from tests.experiments.stops import stop_after
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SETTINGS = (
    "train.steps=10", "study.bootstrap=100",
    "search={space: {optimizer.learning_rate: {log_uniform: [1e-4, 1e-1]}, update.0.rank: {power_of_two: [1, 4]}}, "
    "trials: 6, promote: 2, reference: {optimizer.learning_rate: 1e-3}}",
    "study.transfer.settings={short: {train.steps: 5}, subset: {data.train.limit: 8}, same: {train.log_every: 2}}",
)  # fmt: skip


def study(config: Path, *overrides: str, output: Path, code: int = 0) -> None:
    assert main(["study", "transfer", str(config), f"study.output={output}", *SETTINGS, *overrides, "--json"]) == code


@pytest.mark.slow
def test_a_study_from_command_to_page(config_file, tmp_path, capsys):
    out = tmp_path / "out"
    study(config_file, output=out)
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((out / "summary.json").read_text())
    settings, trials = summary["settings"], summary["trials"]
    assert list(settings) == ["short", "subset", "same"]
    assert len(trials) == 6
    assert trials[0]["configuration"] == {"optimizer.learning_rate": 1e-3}
    full = np.array([trial["scores"]["full"] for trial in trials])
    for name, entry in settings.items():
        cheap = np.array([trial["scores"][name] for trial in trials])
        for measure, oracle in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
            assert entry[measure]["value"] == pytest.approx(oracle(cheap, full).statistic)
            assert entry[measure]["low"] <= entry[measure]["high"]
        chosen = int(np.argmin(cheap))
        assert entry["chosen"] == chosen
        assert entry["rank_in_full"] == sorted(full).index(full[chosen]) + 1
        assert entry["score_in_full"] == full[chosen]
        assert entry["regret"]["value"] == pytest.approx(full[chosen] - full.min())
        assert 0 <= entry["top_5_overlap"]["value"] <= 5
    # What changes no training agrees in full; half of the steps and a full one of six trials cost two thirds.
    same = settings["same"]
    assert (same["spearman"]["value"], same["rank_in_full"], same["regret"]["value"]) == (1.0, 1, 0.0)
    assert settings["short"]["cost_saved"] == pytest.approx(1 - (1 / 2 + 1 / 6), abs=0.01)
    assert settings["subset"]["cost_saved"] == pytest.approx(-1 / 6)
    assert summary["full"]["cost"]["steps"] == 60
    assert summary["budget"]["steps_run"] == 60 + 30 + 60 + 60
    page = (out / "README.md").read_text()
    assert summary["command"] in page
    assert all(f"“{name}”" in page for name in settings)
    ET.parse(out / "scores.svg")

    records = read_journal(tmp_path / "run")
    assert sum(record["event"] == "finished" for record in records) == 4 * 6
    study(config_file, output=tmp_path / "again")
    assert json.loads(capsys.readouterr().out) == {**summary, "command": summary["command"].replace("/out", "/again")}
    assert read_journal(tmp_path / "run") == records


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_and_ends_the_same(config_file, tmp_path, capsys, monkeypatch):
    one = "study.transfer.settings={short: {train.steps: 4}}"
    study(config_file, one, output=tmp_path / "whole")
    stop_after(monkeypatch, 33)  # in the middle of a run
    capsys.readouterr()
    study(config_file, one, f"run_dir={tmp_path / 'stopped'}", output=tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["stopped"] == "signal"
    assert 1 < sum(record["event"] == "finished" for record in read_journal(tmp_path / "stopped")) < 12
    monkeypatch.undo()
    study(config_file, one, f"run_dir={tmp_path / 'stopped'}", output=tmp_path / "out")
    summary, whole = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "whole"))
    assert [trial["scores"] for trial in summary["trials"]] == [trial["scores"] for trial in whole["trials"]]


def test_the_choice_of_a_setting():
    full = np.array([0.3, 0.1, math.inf, 0.2])
    assert _choice(np.array([0.5, 0.6, 0.7, 0.4]), full, Goal("min")) == {
        "chosen": 3, "rank_in_full": 2, "score_in_full": 0.2, "rank_of_full_best": 3,
    }  # fmt: skip
    diverged = _choice(np.array([0.5, 0.6, 0.1, 0.4]), full, Goal("min"))
    assert (diverged["rank_in_full"], diverged["score_in_full"]) == (4, None)
    assert _choice(np.array([0.5, 0.6, 0.7, 0.4]), -full, Goal("max"))["score_in_full"] == 0.2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("study.transfer.settings={}", ["study.transfer.settings", "cheaper setting"]),
        ("study.transfer.settings.short={}", ["study.transfer.settings.short", "overrides nothing"]),
        ("study.transfer.settings.short={train.stepz: 5}", ["study.transfer.settings.short", "train.stepz", "'steps'"]),
        ("study.transfer.settings.short={train.steps: many}", ["study.transfer.settings.short", "train.steps"]),
        ("study.transfer.settings.full={train.steps: 5}", ["study.transfer.settings.full"]),
        ("study.transfer.settings.short={search.trials: 3}", ["settings.short", "search.trials", "same for all"]),
        ("study.transfer.settings.short={optimizer.learning_rate: 3}", ["settings.short", "searched key"]),
        ("study.transfer.settings.short={update: []}", ["settings.short", "'update.0.rank'"]),
        ("study.transfer.settings.small={model.path: nowhere/at-all}", ["settings.small", "nowhere"]),
        ("study.transfer.settings.small={train.sequence_length: 4}", ["settings.small", "sequence_length"]),
        ("study.transfer.settings=short", ["study.transfer.settings"]),
        ("search.trials=5", ["search.trials", "transfer", "6"]),
        ("data.validation=null", ["data.validation"]),
    ],
)
def test_bad_input_is_named(config_file, tmp_path, capsys, override, parts):
    before = sorted(tmp_path.rglob("*"))
    study(config_file, override, output=tmp_path / "out", code=2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("jaxtune: ")
    assert all(part in printed.err for part in parts), printed.err
    assert sorted(tmp_path.rglob("*")) == before
