"""Keys that never act are told by a dry run and at the start of training."""

from __future__ import annotations

import json
import logging

import pytest

from jaxtune.cli import main
from jaxtune.config import load_config
from jaxtune.models import read_config
from jaxtune.training.idle_keys import idle_keys
from jaxtune.updates import UpdatePlan

SPACE = "space: {optimizer.learning_rate: {log_uniform: [1e-4, 1e-2]}}"
SEARCH = f"search={{trials: 12, promote: 1, {SPACE}}}"


@pytest.fixture
def told(config_file, tiny_model):
    decoder = read_config(tiny_model)

    def keys(*overrides: str) -> list[str]:
        config = load_config(config_file, list(overrides))
        return idle_keys(config, UpdatePlan(config.update).resolve(decoder))

    return keys


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.evaluate_every=21"], "train.evaluate_every: 21 is beyond the last step, 20"),
        (["train.checkpoint_every=500"], "train.checkpoint_every: 500 is beyond the last step, 20"),
        (["train.keep.every=30"], "train.keep.every: 30 is beyond the last step, 20"),
        (["train.log_every=100"], "train.log_every: 100 is beyond the last step, 20"),
        # At steps 5, 10, 15: the first is the best so far, two more can be worse.
        (["train.evaluate_every=5", "train.patience=3"], "train.patience: 3 evaluations without improvement cannot"),
        (["train.keep.best=3"], "train.keep.best: 3 by their validation loss, which the last checkpoint alone has"),
        (["train.keep.best=3", "data.validation=null"], "train.keep.best: 3 by their validation loss, and there is no"),
        (["optimizer={schedule: constant, final_scale: 0.1}"], "optimizer.final_scale: 0.1 does nothing"),
        (["optimizer.warmup=0.05"], "optimizer.warmup: 0.05 of 20 steps is no more than one step"),
        (["update.0.rank=64"], "update.0.rank: 64 is above the smaller side of layers.attention.q (32), layers"),
        (["update.0.rank=20"], "update.0.rank: 20 is above the smaller side of layers.attention.v (16)"),
        ([SEARCH, "search.population=13"], "search.population: 13 is above search.trials, 12: the rest stays empty"),
        ([SEARCH, "search.workers=13"], "search.workers: 13 is above search.trials, 12"),
        ([SEARCH, "search.worker_resources={GPU: 1}"], "search.worker_resources: there are no workers"),
        ([SEARCH, "search.population=12"], "search.method: gp never proposes: search.population leaves it none of 12"),
        ([SEARCH, "search.initial=12"], "search.method: gp never proposes: search.initial leaves it none of 12"),
        ([SEARCH, "search.method=sobol", "search.acquisition=ei"], "search.acquisition: ei chooses among"),
        ([SEARCH, "search.fraction=1.0"], "search.promote: 1 does nothing"),
    ],
)  # fmt: skip
def test_a_key_that_never_acts_is_told(told, overrides, expected):
    assert any(message.startswith(expected) for message in told(*overrides)), told(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.evaluate_every=20", "train.checkpoint_every=20", "train.keep.every=20", "train.log_every=20"],
        ["train.evaluate_every=5", "train.patience=2", "train.keep.best=3"],
        ["train.steps=3", "train.log_every=10", "optimizer.warmup=0.1"],  # the defaults
        ["optimizer.warmup=0.06", "optimizer.final_scale=0.1", "update.0.rank=16"],
        [SEARCH, "search.population=4"],
        [SEARCH, "search.population=auto"],
        [f"search={{trials: 4, promote: 1, {SPACE}}}"],
        [SEARCH, "search.acquisition=ei"],
        [SEARCH, "search.method=sobol", "search.initial=12"],
        [SEARCH, "search.method=random", "search.initial=12", "search.workers=2", "search.worker_resources={CPU: 1}"],
    ],
)
def test_a_key_that_acts_is_not_told(told, overrides):
    assert told(*overrides) == []


def test_patience_that_is_not_told_does_stop(told):
    """The most that can stop: of 3 evaluations before the end the last two are worse than the first."""
    assert told("train.steps=16", "train.evaluate_every=5", "train.patience=2") == []
    assert told("train.steps=15", "train.evaluate_every=5", "train.patience=2") != []


def test_dry_runs_and_runs_tell(config_file, capsys, caplog):
    late = "train.evaluate_every=500"
    assert main(["train", str(config_file), late, "--dry-run", "--json"]) == 0
    (message,) = json.loads(capsys.readouterr().out)["warnings"]
    assert message.startswith("train.evaluate_every: 500 is beyond the last step, 20")
    with caplog.at_level(logging.WARNING):
        assert main(["train", str(config_file), late, "train.steps=1", "data.test=null"]) == 0
    assert "never acts: train.evaluate_every: 500 is beyond the last step, 1" in caplog.text
