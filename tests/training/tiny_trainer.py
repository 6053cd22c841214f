"""Trainers of a random model of a few thousand parameters, and batches made by hand."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxtune.config.training_sections import TrainConfig
from jaxtune.models import Decoder, DecoderConfig, random_model
from jaxtune.training import Trainer
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule

VOCABULARY, ROWS, LENGTH = 19, 4, 6
RULES = (
    LowRankRule(match="layers.1.attention.{q,v}", rank=2, alpha=8.0, learning_rate_scale=2.0),
    FullRule(match="layers.0.mlp_norm"),
    FullRule(match="layers.1.mlp_norm", learning_rate_scale=0.0),
)


def tiny_model(mesh: jax.sharding.Mesh | None = None) -> Decoder:
    config = DecoderConfig(
        "llama", VOCABULARY, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, initializer_range=0.4
    )
    return random_model(config, jax.random.key(0), mesh=mesh)


def tiny_trainer(model: Decoder, *arguments: Any, rules: Any = RULES, accumulate: int = 1, **options: Any) -> Trainer:
    settings = TrainConfig(steps=8, batch_size=ROWS, sequence_length=LENGTH, accumulate=accumulate, log_every=1)
    return Trainer(model, UpdatePlan(list(rules)), settings, *arguments, **options)


def own_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Only what the default objective cannot do without; the first half of each row is a prompt of weight 0."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    weights = np.arange(LENGTH) >= 1 + generator.integers(1, LENGTH - 1, (ROWS, 1))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def log_probs(model: Decoder, batch: dict[str, np.ndarray], **adapters: Any) -> np.ndarray:
    """Of each target, in float64 from the logits of whole rows."""
    names = ("positions", "segment_ids")
    given = [None if batch.get(name) is None else np.asarray(batch[name], np.int32) for name in names]
    logits = np.asarray(model(np.asarray(batch["tokens"], np.int32), *given, **adapters), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logs, np.asarray(batch["targets"])[..., None], -1)[..., 0]
