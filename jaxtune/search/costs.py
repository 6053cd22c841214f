"""What a configuration costs, counted before it is trained: no clock has a part in it, so that a replay repeats it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.config import Config, hyperparameters
from jaxtune.models import DecoderConfig
from jaxtune.telemetry.flops import step_flops
from jaxtune.updates.plan import UpdatePlan

Count = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""The counted costs of a configuration, given as dotted overrides, by name."""

DECIDING = ("train", "update", "data")
"""Sections of the configuration that decide counted costs: whatever else differs, they are equal."""

_FLOAT32 = 4


def counted_costs(config: Config, model: DecoderConfig) -> dict[str, float]:
    """``adapter_bytes`` and ``flops`` of a configuration.

    ``adapter_bytes`` are those of the trained numbers in float32, as the adapter's file has them: of a low-rank term
    the columns up to its rank. ``flops`` are those of the whole training (:mod:`jaxtune.telemetry.flops`).

    Args:
      config: of the training; without ``train.steps`` it has no ``flops``.
      model: the base.

    Raises:
      UserError: a rule does not fit the model.
    """
    plan, values = UpdatePlan(config.update).resolve(model), hyperparameters(config)
    step = step_flops(
        model,
        tokens=config.train.batch_size * config.train.sequence_length,
        sequence_length=config.train.sequence_length,
        added=plan.flops(values),
        full=plan.weight_shares(),
    )
    costs = {"adapter_bytes": float(_FLOAT32 * plan.trainable_parameters(values))}
    return costs if config.train.steps is None else {**costs, "flops": step.total * config.train.steps}
