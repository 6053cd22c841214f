"""The tiny task opened by hand: a model on one device, examples, batches, and trainers that share compiled steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from jaxtune.config.data_section import DataConfig, SourceConfig
from jaxtune.config.training_sections import TrainConfig
from jaxtune.data import evaluation_batches, make_examples, open_source, train_batches
from jaxtune.models import load_model, load_tokenizer
from jaxtune.training import Trainer
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.low_rank import LowRankRule
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]


@pytest.fixture(scope="session")
def model(tiny_model):
    """The tiny model on one device, float32."""
    return load_model(tiny_model, dtype="float32")


@pytest.fixture(scope="session")
def examples(rows, tiny_model):
    """The examples of two splits."""
    config = DataConfig(train=SourceConfig(path="-"), prompt="{question} :", completion=" {answer}")
    tokenizer = load_tokenizer(tiny_model)
    return {
        part: make_examples(
            open_source(SourceConfig(path=str(rows / f"{part}.jsonl"))), config, tokenizer, sequence_length=12
        )
        for part in ("train", "validation")
    }


@pytest.fixture
def batches(examples):
    """Makes endless training batches: four rows of 12 positions, of which eight are used."""

    def make(seed: int = 0):
        return train_batches(examples["train"], batch_size=4, sequence_length=12, seed=seed, packing=False)

    return make


@pytest.fixture(scope="session")
def validation(examples):
    """The batches of an evaluation."""
    return evaluation_batches(examples["validation"], batch_size=4, sequence_length=12, packing=False)


@pytest.fixture(scope="session")
def trainer(model):
    """A trainer of eight steps with a high rate and without dropout."""
    return Trainer(
        model,
        UpdatePlan([LowRankRule(match="layers.*.attention.{q,v}", rank=4, alpha=8.0)]),
        TrainConfig(steps=8, batch_size=4, sequence_length=12, log_every=1),
        OptimizerConfig(learning_rate=1e-2),
    )


@pytest.fixture
def variant(trainer) -> Callable[..., Any]:
    """Makes the same trainer with other settings of the loop; what is compiled is shared."""

    def make(**settings: Any) -> Any:
        other = copy.copy(trainer)
        other.config = trainer.config.model_copy(update=settings)
        if "steps" in settings:
            other.hyperparameters = {**trainer.hyperparameters, "train.steps": float(settings["steps"])}
        return other

    return make
