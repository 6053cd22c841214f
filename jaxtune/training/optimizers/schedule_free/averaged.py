"""Schedule-free AdamW on one tensor."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtune_kernels.masked_update.rules import corrections
from jaxtyping import Array, Float, Int32

from jaxtune.training.per_tensor import Numbers, Step


class AveragedState(NamedTuple):
    """Of one tensor.

    Attributes:
      steps: done.
      fast: the iterate z that steps are made of.
      square: running mean of squared gradients.
      largest: rate so far.
      weight: of all steps so far in the mean of the path.
    """

    steps: Int32[Array, "*n"]
    fast: Float[Array, "..."]
    square: Float[Array, "..."]
    largest: Float[Array, "*n"]
    weight: Float[Array, "*n"]


@dataclasses.dataclass(frozen=True)
class Averaged:
    """Schedule-free AdamW (Defazio et al., arXiv:2405.15682, algorithm 1).

    The tensor is x, the mean of the path of z with weights by the square of the largest rate so far. A gradient is
    taken at y = beta1 x + (1 - beta1) z, which is all the momentum that there is; decay is that of y.
    """

    def init(self, array: Float[Array, "..."]) -> AveragedState:
        """z where x is."""
        nothing = jnp.zeros((), array.dtype)
        return AveragedState(jnp.int32(0), jnp.copy(array), jnp.zeros_like(array), nothing, nothing)

    def point(self, array: Float[Array, "..."], state: AveragedState, numbers: Numbers) -> Float[Array, "..."]:
        """y, between the mean and the iterate."""
        return state.fast + numbers["beta1"] * (array - state.fast)

    def apply(
        self, gradient: Float[Array, "..."], state: AveragedState, array: Float[Array, "..."], step: Step
    ) -> tuple[Float[Array, "..."], AveragedState]:
        """One step of z, and the mean with it."""
        steps, b2 = state.steps + 1, jnp.asarray(step.numbers["beta2"], jnp.float32)
        square = b2 * state.square + (1 - b2) * gradient * gradient
        direction = gradient / (jnp.sqrt(square * corrections(steps, b2)) + step.numbers["epsilon"])
        fast = state.fast - step.rate * (direction + step.decay * self.point(array, state, step.numbers))
        largest = jnp.maximum(state.largest, step.rate)
        weight = state.weight + largest**2
        share = jnp.where(weight > 0, largest**2 / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny), 0.0)
        return array + share * (fast - array), AveragedState(steps, fast, square, largest, weight)
