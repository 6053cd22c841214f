"""Trials through the trainer that they share."""

from __future__ import annotations

import pytest

from jaxtune.config import load_config
from jaxtune.search.runner import run_all
from jaxtune.search.trainer_runner import TrainerRunner, _set_aside
from jaxtune.search.trial import Trial
from jaxtune.telemetry.writers import read_metrics
from jaxtune.training.experiment import Experiment
from jaxtune.training.run import train
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SEARCH = "search={trials: 2, promote: 1, space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}}}"


OVERRIDES = {"train.seed": 1, "update.0.rank": 2, "update.0.dropout": 0.1, "optimizer.learning_rate": 0.03}


def losses(directory):
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]


def test_a_trial_is_the_run_of_its_own_configuration(config_file, tmp_path):
    """Whatever trial made the trainer: start and dropout of its own seed, columns of its own rank, and one program."""
    common = ["train.steps=3", "data.test=null"]
    runner = TrainerRunner(Experiment(load_config(config_file, [SEARCH, *common])))
    jobs = [(Trial(0, {}, tmp_path / "0"), 1), (Trial(1, OVERRIDES, tmp_path / "1"), 3)]
    outcome = {trial.id: outcome for trial, outcome in run_all(runner, jobs)}[1]
    assert runner.compilations == 1
    changes = [f"{key}={value}" for key, value in OVERRIDES.items()]
    alone = train(load_config(config_file, [*common, *changes]))
    assert outcome.score == pytest.approx(alone["metrics"]["validation_loss"], rel=1e-5)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    assert losses(tmp_path / "0") != pytest.approx(losses(tmp_path / "1")[:1], rel=1e-5)


def _trial(directory, config, step):
    (directory / "checkpoints" / str(step)).mkdir(parents=True)
    (directory / "config.yaml").write_text(config)


def test_a_trial_goes_on_from_its_own_files_only(tmp_path):
    directory = tmp_path / "000"
    _set_aside(directory, "rate: 1", 4)
    directory.mkdir()
    _set_aside(directory, "rate: 1", 4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["000"]
    _trial(directory, "rate: 1", 4)
    _set_aside(directory, "rate: 1", 4)
    _set_aside(directory, "rate: 1", 20)
    assert (directory / "checkpoints" / "4").is_dir()
    # Beyond the step that it is to be scored at, and another trial's: both would give a wrong score.
    _set_aside(directory, "rate: 1", 3)
    assert not directory.exists()
    _trial(directory, "rate: 2", 2)
    _set_aside(directory, "rate: 1", 4)
    assert not directory.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"000.1", "000.2"}
    assert (tmp_path / "000.1" / "checkpoints" / "4").is_dir(), "nothing is lost"
