"""The update rules, element by element in float32: every implementation of the masked update calls these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtune_kernels.rounding import random_words, round_stochastically, three_halves


class Coefficients(NamedTuple):
    """The scalars of one step, float32: traced, so that another value is not another program."""

    learning_rate: Any
    b1: Any
    b2: Any
    epsilon: Any
    weight_decay: Any
    """Decoupled: the parameter shrinks by ``learning_rate · weight_decay`` of itself, whatever its gradient."""
    clip: Any
    """A factor on the gradient, such as clipping by global norm gives."""


class Corrections(NamedTuple):
    """What makes up for moments that start at zero, for each block: ``1 / (1 - b^t)``, t its number of updates."""

    first: Any
    second: Any


class UpdateRule(NamedTuple):
    """How a parameter moves: ``step(p, g, moments, coefficients, corrections) -> (p, moments)``, all float32."""

    step: Callable[..., tuple[Array, tuple[Array, ...]]]
    moments: int
    b1: float
    b2: float


def adamw(p: Array, g: Array, moments: tuple[Array, ...], c: Coefficients, corrections: Corrections):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2)."""
    m, v = moments
    g = c.clip * g
    m = c.b1 * m + (1 - c.b1) * g
    v = c.b2 * v + (1 - c.b2) * (g * g)
    direction = m * corrections.first / (jnp.sqrt(v * corrections.second) + c.epsilon)
    return p - c.learning_rate * (direction + c.weight_decay * p), (m, v)


def sgd(p: Array, g: Array, moments: tuple[Array, ...], c: Coefficients, corrections: Corrections):
    """Gradient descent with momentum ``b1`` (Polyak's heavy ball, as torch and optax write it)."""
    (m,) = moments
    m = c.b1 * m + c.clip * g
    return p - c.learning_rate * (m + c.weight_decay * p), (m,)


def lion(p: Array, g: Array, moments: tuple[Array, ...], c: Coefficients, corrections: Corrections):
    """Lion (Chen et al., arXiv:2302.06675, algorithm 2): the sign of one average moves, another is kept."""
    (m,) = moments
    g = c.clip * g
    direction = jnp.sign(c.b1 * m + (1 - c.b1) * g)
    m = c.b2 * m + (1 - c.b2) * g
    return p - c.learning_rate * (direction + c.weight_decay * p), (m,)


UPDATE_RULES = {
    "adamw": UpdateRule(adamw, moments=2, b1=0.9, b2=0.999),
    "sgd": UpdateRule(sgd, moments=1, b1=0.9, b2=0.0),
    "lion": UpdateRule(lion, moments=1, b1=0.9, b2=0.99),
}


def corrections(steps: Int32[Array, "*n"], b: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """``1 / (1 - b^t)``, for t >= 1 updates."""
    # 1 - 0.999 is exact in float32, where 0.999^t has lost four of its seven digits by the time 1 is taken away.
    return -1.0 / jnp.expm1(steps.astype(jnp.float32) * jnp.log1p(b - 1.0))


def updated(
    rule: UpdateRule,
    p: Array,
    g: Array,
    moments: tuple[Array, ...],
    coefficients: Coefficients,
    corrections: Corrections,
    seed: Array,
    rows: Array,
    columns: Array,
) -> tuple[Array, tuple[Array, ...]]:
    """The rule on stored values: widened to float32, moved, and rounded back to what each was stored as.

    Args:
      rule: the rule.
      p: parameters, float32 or bfloat16; so are the gradients g and the moments, of the same shape.
      g: gradients.
      moments: as many as the rule has.
      coefficients: broadcast against p.
      corrections: broadcast against p.
      seed: names the draw of the stochastic rounding; broadcasts against p.
      rows: uint32 identities of the rows, broadcast against p; so do the columns.
      columns: uint32 identities of the columns.
    """
    stored = (p, *moments)
    wide = tuple(m.astype(jnp.float32) for m in moments)
    p, wide = rule.step(p.astype(jnp.float32), g.astype(jnp.float32), wide, coefficients, corrections)
    values = (p, *wide)
    if any(like.dtype == jnp.bfloat16 for like in stored):
        words = three_halves(random_words(seed, rows, columns))
        values = tuple(
            round_stochastically(value, word) if like.dtype == jnp.bfloat16 else value
            for value, like, word in zip(values, stored, words, strict=False)
        )
    return values[0], values[1:]
