"""One run from configuration to summary, in this process."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest

from jaxtune.config import load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.models import load_model, load_tokenizer
from jaxtune.models.decoder import split
from jaxtune.telemetry.progress import ProgressBoard
from jaxtune.telemetry.writers import read_metrics
from jaxtune.training import trainer as trainer_module
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run import Diverged, train
from jaxtune.training.summary import RunSummary
from jaxtune.training.trained import trained
from tests.kill_anywhere import timeless
from tests.told_types import check_types


@pytest.fixture
def config(config_file):
    changes = {"train.steps": 6, "train.checkpoint_every": 2, "data.validation": None, "data.test": None}
    return with_overrides(load_config(config_file), changes)


def test_the_summary_tells_what_was_done(config, tmp_path):
    told = []
    summary = train(config, on_plan=told.append)
    directory = tmp_path / "run"
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert {key: summary[key] for key in ("name", "run_dir", "stopped", "steps", "compilations", "examples")} == {
        "name": "tiny",
        "run_dir": str(directory),
        "stopped": "finished",
        "steps": 6,
        "compilations": 1,
        "examples": {"train": 64},
    }
    check_types(RunSummary, summary)
    assert summary["trained_parameters"] == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert summary["examples_per_step"] == 8
    assert summary["adapter"] == {"path": str(directory / "adapter"), "step": 6}
    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {name: lines[-1][name] for name in summary["metrics"]} == summary["metrics"]
    assert [rows[-2]["parameters"] for rows in told] == [summary["trained_parameters"]], "the row of the total"
    assert load_config(directory / "config.yaml") == config
    assert {item.name for item in directory.iterdir()} == {
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "summary.json",
        "run.lock",
    }


def test_epochs_train_and_are_found_finished(config):
    epochs = with_overrides(config, {"train.steps": None, "train.epochs": 0.5})
    summary = train(epochs)
    assert summary.steps == summary["steps"] == 4
    again = train(epochs)
    assert again == summary
    assert again.adapter == summary.adapter is not None
    assert again._repr_html_() == summary._repr_html_()


@pytest.mark.parametrize("listener", ["auto", None])
def test_the_progress_is_shown_where_someone_looks(config, monkeypatch, listener):
    told = []

    class Board(ProgressBoard):
        watched = True

        def add(self, title, step, total):
            told.append((title, step, total))
            return super().add(title, step, total)

    monkeypatch.setattr("jaxtune.telemetry.progress.ProgressBoard", Board)
    train(with_overrides(config, {"train.steps": 2, "train.checkpoint_every": None}), listener=listener)
    assert told == ([("tiny", 0, 2)] if listener else [])


def test_a_stopped_run_goes_on_and_nothing_is_counted_twice(config, tmp_path):
    asked = iter([False, False, True])
    first = train(config, should_stop=lambda: next(asked))
    assert (first["stopped"], first["steps"]) == ("signal", 3)
    assert not (tmp_path / "run" / "summary.json").exists()
    second = train(config)
    assert (second["stopped"], second["steps"]) == ("finished", 6)
    stopped = read_metrics(tmp_path / "run" / "metrics.jsonl")
    undisturbed = train(with_overrides(config, {"run_dir": str(tmp_path / "whole")}))
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in stopped] == [(line["step"], line["loss"]) for line in whole]
    # Killed once more, behind its last checkpoint and before its summary was written.
    (tmp_path / "run" / "summary.json").unlink()
    for summary in (second, train(config)):
        assert timeless({**summary, "adapter": None}) == timeless({**undisturbed, "adapter": None})
    assert {"loss", "grad_norm"} <= undisturbed["metrics"].keys()


def test_any_run_directory_s_name_will_do(config, tmp_path):
    config = with_overrides(config, {"train.steps": 2, "run_dir": str(tmp_path / "t[1]" / "a\\b")})
    summary = train(config)
    left = trained(OpenedConfig(config, parts=()))
    assert left.origin == f"{config.directory} at step 2"
    assert trained(OpenedConfig(config, parts=()), adapter=summary["adapter"]["path"]).origin.endswith("adapter")


def test_a_diverged_run_says_so_and_keeps_its_last_good_checkpoint(config, tmp_path, monkeypatch):
    whole = trainer_module.Trainer.step

    def step(self, state, batch, hyperparameters=None):
        state, metrics = whole(self, state, batch, hyperparameters)
        return state, {**metrics, "loss": metrics["loss"] * (math.nan if int(state.step) >= 4 else 1.0)}

    monkeypatch.setattr(trainer_module.Trainer, "step", step)
    with pytest.raises(Diverged, match=r"not finite at step 4; .*checkpoints up to step 2 are kept"):
        train(config)
    directory = tmp_path / "run"
    assert (directory / "checkpoints" / "2").is_dir()
    assert not (directory / "checkpoints" / "4").exists()
    assert [line["loss"] is None for line in read_metrics(directory / "metrics.jsonl")] == [False] * 3 + [True]
    assert not (directory / "summary.json").exists()


def test_what_no_adapter_holds_is_left_as_a_whole_model(config, tmp_path, caplog):
    # PEFT saves a module whole, or adapts it: not its layers one way or the other.
    rules = [
        {"match": "layers.0.attention.q", "method": "low_rank", "rank": 2},
        {"match": "layers.1.attention.q", "method": "full"},
        {"match": "layers.*.mlp_norm", "method": "full"},
    ]
    optimizer = {"kind": "lion", "learning_rate": 1e-2}
    config = type(config).model_validate({**config.model_dump(), "update": rules, "optimizer": optimizer})
    config = with_overrides(config, {"train.steps": 2})
    summary, directory = train(config), tmp_path / "run"
    assert "adapter" not in summary
    assert not (directory / "adapter").exists()
    assert summary.model == summary["model"] == {"path": str(directory / "model"), "step": 2}
    check_types(RunSummary, summary)
    # What the layers came to, told from the checkpoint by hand.
    opened = OpenedConfig(config, parts=())
    base, state = split(opened.model)[1], trained(opened).state
    left = split(load_model(directory / "model", dtype="float32"))[1]
    norms = state.trainable["full"]["layers.mlp_norm.scale"]
    term = {part: np.asarray(array) for part, array in state.trainable["low_rank"]["layers.attention.q"].items()}
    query = np.array(base["layers.attention.q.kernel"])
    query[0] += 32.0 / 2 * term["a"][0] @ term["b"][0]
    query[1] = state.trainable["full"]["layers.attention.q.kernel"][0]
    changed = {"layers.mlp_norm.scale": np.asarray(norms), "layers.attention.q.kernel": query}
    assert left.keys() == base.keys()
    for name, array in left.items():
        np.testing.assert_allclose(array, changed.get(name, base[name]), rtol=1e-6, atol=1e-7, err_msg=name)
        assert np.array_equal(array, base[name]) == (name not in changed)
    assert load_tokenizer(directory / "model").eos_token == "</s>"
    # Killed while it was written: what is there is put aside, and the same call writes it whole.
    (directory / "summary.json").unlink()
    weights = directory / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(b"")
    (directory / ".model.partial").mkdir()
    assert train(config)["model"] == summary["model"]
    assert weights.read_bytes() == before
    assert not (directory / ".model.partial").exists()
    # Moved, it is where the directory is.
    directory.rename(tmp_path / "moved")
    moved = with_overrides(config, {"run_dir": str(tmp_path / "moved")})
    assert train(moved)["model"]["path"] == str(tmp_path / "moved" / "model")


def test_data_that_changed_under_a_run_is_refused(config, tmp_path, rows):
    copy = tmp_path / "rows.jsonl"
    lines = (rows / "train.jsonl").read_text().splitlines(keepends=True)
    copy.write_text("".join(lines))
    config = with_overrides(config, {"data.train": {"path": str(copy)}})
    asked = iter([False, True])
    train(config, should_stop=lambda: next(asked))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    copy.write_text("".join(lines[::-1]))
    with pytest.raises(UserError, match=r"data\.train \(64 examples then, 64 now\): other data than the run in"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_finished_run_is_taken_further_in_its_directory(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxtune.training.save_schedule")
    config = with_overrides(config, {"train.steps": 1})
    longer, directory = with_overrides(config, {"train.steps": 3}), tmp_path / "run"
    train(config)
    assert (directory / "summary.json").exists()
    # Stopped on the way, it has not ended.
    asked = iter([True])
    in_epochs = with_overrides(longer, {"train.steps": None, "train.epochs": 0.375})
    assert train(in_epochs, should_stop=lambda: next(asked))["steps"] == 2
    assert "train.steps was 1 and is 3: from step 1 on, the learning rate is planned anew" in caplog.text
    assert not (directory / "summary.json").exists()
    assert load_config(directory / "config.yaml") == longer
    summary = train(longer)
    assert summary["planned"] == [{"from_step": 0, "steps": 1}, {"from_step": 1, "steps": 3}]
    assert (summary["stopped"], summary["steps"], summary["adapter"]["step"]) == ("finished", 3, 3)
    assert summary == json.loads((directory / "summary.json").read_text())
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [1, 2, 3]
    # It has ended as a longer one: the shorter one is another run now, and so is one that differs in more.
    for changes in ({"train.steps": 1}, {"train.steps": 9, "optimizer.learning_rate": 0.5}):
        with pytest.raises(UserError, match=r"holds another run; it differs in(.|\n)*train\.steps: there 3"):
            train(with_overrides(longer, changes))
    assert train(longer) == summary
