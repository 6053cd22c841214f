"""How many trials train at a time: what is given, what the memory holds, and what a study began with."""

from __future__ import annotations

import json

import pytest

from jaxtune.config import load_config
from jaxtune.errors import UserError
from jaxtune.search import population_size as module
from jaxtune.search.population_size import fitting, population_size
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.memory import compiled_memory
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.population import Population
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SPACE = "space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}}"


def opened(config_file, search):
    config = load_config(config_file, [f"search={{promote: 1, {SPACE}, {search}}}", "train.steps=5", "data.test=null"])
    return TrainerRunner(OpenedConfig(config))


@pytest.fixture
def auto(config_file):
    """A study of 64 trials that leaves the number to the memory, with its one program."""
    runner = opened(config_file, "trials: 64, population: auto")
    runner.trainer(runner.opened.config)
    return runner


@pytest.fixture
def trainer(auto):
    return auto.trainers[0]


@pytest.fixture
def batch(auto):
    batches = auto.opened.batches()
    yield next(batches)
    batches.close()


@pytest.fixture
def memory(trainer, batch):
    """Bytes of the step of one to four slots at once."""
    compiled = {size: Population(trainer, size, batched=True).compile_step(batch) for size in (1, 2, 4)}
    return {size: compiled_memory(each)["total"] for size, each in compiled.items()}


def test_memory_is_affine_in_the_number_of_slots(memory):
    slot = memory[2] - memory[1]
    assert slot > 0
    assert memory[4] == pytest.approx(memory[1] + 3 * slot, rel=0.05)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 1), (2.0, 3), (1e6, 40)])
def test_what_fits(trainer, batch, limit, expected):
    """So many slots beyond the first as their bytes go into what the first leaves; never fewer than one."""
    one, two = (compiled_memory(Population(trainer, size).compile_step(batch))["total"] for size in (1, 2))
    assert fitting(trainer, one + (limit + 0.5) * (two - one), 40) == expected


def test_auto_is_a_power_of_two_within_memory_and_a_quarter_of_the_trials(auto, tmp_path, monkeypatch):
    assert population_size(auto, tmp_path) == 16
    monkeypatch.setattr(module, "fitting", lambda trainer, limit, most: min(most, 7))
    assert population_size(auto, tmp_path) == 4
    monkeypatch.setattr(module, "memory_bytes", lambda mesh: None)
    assert population_size(auto, tmp_path) == 16


def test_a_study_that_goes_on_keeps_its_number(auto, tmp_path):
    (tmp_path / "trials.jsonl").write_text(json.dumps({"event": "study", "population": 2}) + "\n")
    assert population_size(auto, tmp_path) == 2


def test_a_number_that_is_given_stands(config_file, tmp_path):
    assert population_size(opened(config_file, "trials: 4, population: 3"), tmp_path) == 3


def test_a_number_that_does_not_divide_is_refused(config_file, tmp_path):
    search = f"search={{promote: 1, {SPACE}, trials: 4, population: 3}}"
    mesh = ["parallel={trial: 2, data: 4}", "train.batch_size=8", "data.test=null"]
    runner = TrainerRunner(OpenedConfig(load_config(config_file, [search, *mesh])))
    with pytest.raises(UserError, match=r"search\.population: 3 trials do not divide .*trial = 2; nearest: 4"):
        population_size(runner, tmp_path)
