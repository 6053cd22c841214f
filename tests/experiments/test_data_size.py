"""``jaxtune study data-size`` on a tiny task."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from jaxtune.cli import main
from jaxtune.config import load_config
from jaxtune.experiments.data_size import _open
from jaxtune.experiments.data_size_page import saturation_sentence
from jaxtune.search import read_journal
from jaxtune.search.trial import Trial
from tests.experiments.stops import stop_after
from tests.kill_anywhere import timeless
from tests.tiny_task import WORDS, config_file, configuration, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SETTINGS = (
    "train.steps=6", "train.evaluate_every=2", "optimizer.learning_rate=3e-2", "study.bootstrap=100",
    "study.data_size={sizes: [0, 4, 16, all], seeds: [1, 2], sampling: random}",
)  # fmt: skip


@pytest.fixture
def attributes(tmp_path, tiny_model):
    """A configuration over documents with two attributes each, of which one is rare."""
    for split, count in (("train", 40), ("validation", 8), ("test", 12)):
        with (tmp_path / f"{split}.jsonl").open("w") as file:
            for index in range(count):
                values = {"w1": WORDS[5 + index % 5]} | ({"w2": WORDS[12]} if index % 4 == 0 else {})
                row = {"text": " ".join(WORDS[(index + place) % 40] for place in range(3)), "attributes": values}
                file.write(json.dumps(row) + "\n")
    (tmp_path / "schema.json").write_text('["w1", "w2"]')
    path = tmp_path / "run.yaml"
    text = configuration(tmp_path / "run", tiny_model, tmp_path)
    text = text.replace("{question} :", "{text} : {attribute}").replace("{answer}", "{value}")
    path.write_text(
        text.replace(
            "  packing",
            f"  explode: {{field: attributes, schema_path: {tmp_path / 'schema.json'}, absent: w0}}\n  packing",
        )
    )
    return path


def study(config: Path, *overrides: str, output: Path, code: int = 0) -> None:
    assert main(["study", "data-size", str(config), f"study.output={output}", *SETTINGS, *overrides, "--json"]) == code


def test_a_study_from_command_to_page(config_file, tmp_path, capsys):
    out = tmp_path / "out"
    study(config_file, output=out)
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["sizes"] == [0, 4, 16, 64]
    assert [entry["size"] for entry in summary["scores"]] == summary["sizes"]
    for entry in summary["scores"][1:]:
        each = [seed["score"] for seed in entry["seeds"]]
        assert len(each) == 2
        assert entry["mean"] == pytest.approx(sum(each) / 2)
        assert entry["standard_error"] > 0
        assert all(seed["best_step"] in (2, 4, 6) for seed in entry["seeds"])
    # Six steps of eight rows, one example in each row.
    assert summary["scores"][1]["seeds"][0]["passes"] == pytest.approx(12)
    assert summary["scores"][3]["seeds"][0]["passes"] == pytest.approx(48 / 64)
    # The mean of the documents' losses and the loss over all are summed in another order.
    (untuned,) = summary["scores"][0]["seeds"]
    mean = pytest.approx(summary["scores"][0]["mean"], rel=1e-12)
    assert untuned == {"seed": None, "score": mean, "metrics": {"loss": mean}}
    assert summary["scores"][3]["mean"] < summary["scores"][0]["mean"], "training helps"
    assert summary["ceiling"]["low"] <= summary["ceiling"]["high"]
    assert summary["saturation"] in (None, *summary["sizes"])
    assert "one standard error" in summary["rule"]
    assert summary["next_doubling"]["documents"] == 128
    assert summary["by_attribute"] == {}
    assert summary["paper"]["saturation"] == 6500
    assert summary["paper"]["ours"]["basis"] == "extrapolated"
    assert summary["budget"]["compilations"] == 1, "one program for all sizes"
    assert summary["budget"]["steps_run"] == 6 * 6
    assert summary["command"].startswith("jaxtune study data-size ")
    page = (out / "README.md").read_text()
    assert saturation_sentence(summary) in page
    assert summary["command"] in page
    ET.parse(out / "curve.svg")

    # Asked again, everything is known: nothing is trained, and the numbers are the same.
    records = len(read_journal(tmp_path / "run"))
    study(config_file, "study.data_size.epsilon=100", output=tmp_path / "again")
    again = json.loads(capsys.readouterr().out)
    assert len(read_journal(tmp_path / "run")) == records
    assert [entry["mean"] for entry in again["scores"]] == [entry["mean"] for entry in summary["scores"]]
    assert (again["saturation"], again["epsilon"]) == (0, 100)
    assert "100 behind" in again["rule"]


def test_groups_have_their_own_curves(attributes, tmp_path, capsys):
    overrides = ("study.data_size.sampling=stratified", "study.data_size.sizes=[0, 4, 12, 40]")
    study(attributes, *overrides, output=tmp_path / "out")
    summary = json.loads(capsys.readouterr().out)
    groups = summary["by_attribute"]
    assert {name: entry["train_documents"] for name, entry in groups.items()} == {"w1": 40, "w2": 10}
    assert [entry["examples"] for entry in summary["scores"]] == [0, 8, 24, 80]
    assert all(entry["examples"] == 12 and len(entry["scores"]) == 4 for entry in groups.values())
    last = summary["scores"][-2]["mean"] - summary["scores"][-1]["mean"]
    assert sum(entry["last_gain"] for entry in groups.values()) == pytest.approx(last)
    assert "## By attribute" in (tmp_path / "out" / "README.md").read_text()
    ET.parse(tmp_path / "out" / "groups.svg")


def test_examples_are_passed_over_as_often_as_the_epochs_say(attributes, tmp_path):
    """One to a row, eight rows to a step; trained and measured to the last of its steps, and again if that is lost."""
    settings = ["train.steps=null", "train.epochs=2", "train.evaluate_every=null", "train.batch_size=8"]
    sizes = "study.data_size={unit: examples, sizes: [0, 8, 24, 80], seeds: [1, 2], sampling: stratified}"
    runner, chosen = _open(load_config(attributes, [*settings, sizes]))
    assert chosen == [0, 8, 24, 80]
    trials = [Trial(size, {"examples": size, "train.seed": 1}, tmp_path / str(size)) for size in chosen[1:]]
    assert [len(runner.places(size, 1)) for size in chosen[1:]] == [8, 24, 80]
    assert [runner.total_steps(trial) for trial in trials] == [2, 6, 20]
    trial = trials[1]
    trial.directory.mkdir()
    runner.start(trial, 6)
    ((_, outcome),) = runner.wait()
    assert (outcome.steps_run, outcome.metrics["best_step"], outcome.metrics["passes"]) == (6, 6.0, 2.0)
    tested = runner.test(trial)
    shutil.rmtree(trial.directory)
    assert runner.test(trial).per_example == tested.per_example


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_and_ends_the_same(config_file, tmp_path, capsys, monkeypatch):
    study(config_file, output=tmp_path / "whole", code=0)
    capsys.readouterr()
    stop_after(monkeypatch, 15)  # in the middle of a run
    study(config_file, f"run_dir={tmp_path / 'stopped'}", output=tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["stopped"] == "signal"
    assert not (tmp_path / "out").exists()
    events = [record["event"] for record in read_journal(tmp_path / "stopped")]
    assert events[-1] == "proposed", "stopped in the middle of a run"
    shutil.rmtree(tmp_path / "stopped" / "trials")
    monkeypatch.undo()
    study(config_file, f"run_dir={tmp_path / 'stopped'}", output=tmp_path / "out")
    summary, whole = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "whole"))
    assert summary["scores"] == whole["scores"]
    assert summary["ceiling"] == whole["ceiling"]
    journals = [timeless(read_journal(tmp_path / name)[1:]) for name in ("stopped", "run")]
    assert journals[0] == journals[1]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("study.data_size.sizes=[0, 4, 16, 65]", ["study.data_size.sizes", "65", "64 documents"]),
        ("study.data_size={unit: examples, sizes: [0, 4, 16, 65]}", ["study.data_size.sizes", "65", "64 examples"]),
        ("study.data_size.unit=questions", ["study.data_size.unit", "documents, examples"]),
        ("study.data_size.saturation=gaps", ["study.data_size.saturation", "'gap'"]),
        ("study.data_size.sizes=[0, 4, 16]", ["study.data_size.sizes", "at least 4"]),
        ("study.data_size.sizes=[0, 64, 64, all]", ["study.data_size", "too few"]),
        ("study.data_size.sizes=[0, 4, 16, most]", ["study.data_size.sizes.3"]),
        ("study.data_size.seeds=0", ["study.data_size.seeds"]),
        ("study.data_size.seeds=[]", ["study.data_size.seeds"]),
        ("study.data_size.seeds=[1, 1]", ["study.data_size.seeds", "twice"]),
        ("study.data_size.sampling=stratifed", ["study.data_size.sampling", "'stratified'"]),
        ("study.data_size.sampling=balanced", ["study.data_size.sampling", "group_by"]),
        ("study.data_size.group_by=questions", ["study.data_size.group_by", "'question'"]),
        ("study.data_size={sizes: null, smallest: 65}", ["study.data_size.smallest", "65"]),
        ("study.data_size.score=exact_match", ["study.data_size.score", "evaluation.task"]),
        ("study.data_size.epsilon=0", ["study.data_size.epsilon", "greater than 0"]),
        ("study.data_size.sise=3", ["study.data_size.sise", "unknown key", "'sizes'"]),
        ("train.evaluate_every=null", ["train.evaluate_every", "several"]),
        ("train.evaluate_every=7", ["train.evaluate_every", "7"]),
        ("data.test=null", ["data.test", "required"]),
        ("data.validation=null", ["data.validation", "required"]),
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


def test_another_study_in_the_directory_is_refused(config_file, tmp_path, capsys):
    study(config_file, "train.steps=2", output=tmp_path / "out")
    study(config_file, "train.steps=2", "study.data_size.seeds=[1, 3]", output=tmp_path / "out", code=2)
    assert "settings.seeds" in capsys.readouterr().err
