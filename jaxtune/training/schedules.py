"""Learning-rate schedules over traced hyperparameters, so that a change of length or warm-up does not recompile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.errors import UserError

ScheduleFunction = Callable[[Any], Any]
"""From the steps done so far (an int32 scalar, traced; 0 for the first step) to a factor on the learning rate."""

Schedule = Literal["cosine", "linear", "constant"] | ScheduleFunction


def learning_rate(
    step: Int[Array, ""], hyperparameters: Mapping[str, Float[Array, ""]], schedule: Schedule
) -> Float[Array, ""]:
    """The learning rate of one step.

    It rises linearly over ``optimizer.warmup`` × ``train.steps`` steps (the first step already moves) and then falls to
    ``optimizer.final_scale`` of the peak at the last step: along half a cosine (arXiv:1608.03983, eq. 5), along a line,
    or not at all.

    Args:
      step: steps done so far, 0 for the first.
      hyperparameters: ``train.steps``, ``optimizer.learning_rate``, ``optimizer.warmup``, ``optimizer.final_scale``.
      schedule: the shape of the decay; or a function of the step alone, whose value is the factor on the peak.
    """
    if callable(schedule):
        return hyperparameters["optimizer.learning_rate"] * scale_of(schedule, step)
    total = hyperparameters["train.steps"]
    warmup = hyperparameters["optimizer.warmup"] * total
    now = step.astype(jnp.float32)
    rise = jnp.minimum((now + 1.0) / jnp.maximum(warmup, 1.0), 1.0)
    progress = jnp.clip((now - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    match schedule:
        case "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        case "linear":
            decay = 1.0 - progress
        case "constant":
            return hyperparameters["optimizer.learning_rate"] * rise
    final = hyperparameters["optimizer.final_scale"]
    return hyperparameters["optimizer.learning_rate"] * rise * (final + (1.0 - final) * decay)


def scale_of(schedule: ScheduleFunction, step: Int[Array, ""]) -> Float[Array, ""]:
    """A schedule function's factor at one step.

    Raises:
      UserError: it does not return one number.
    """
    try:
        scale = jnp.asarray(schedule(step), jnp.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule: a function of the step that returns one number is needed ({error})") from error
    if scale.shape:
        raise UserError(f"schedule: the function returned an array of the shape {scale.shape}; one number is needed")
    return scale
