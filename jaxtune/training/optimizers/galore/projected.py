"""Adam in the leading singular directions of one matrix's gradient."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from jaxtune.training.per_tensor import AdamState, Numbers, Step, adam_direction


class ProjectedState(NamedTuple):
    """Of one matrix.

    Attributes:
      projector: orthonormal columns, a basis of the subspace of the matrix's shorter side.
      adam: of the projected gradient.
    """

    projector: Float[Array, "short rank"]
    adam: AdamState


@dataclasses.dataclass(frozen=True)
class Projected:
    """GaLore (arXiv:2403.03507, algorithm 2) on one matrix whose shorter side is above the rank.

    With P the leading singular vectors of the gradient G on its shorter side, taken anew every ``period`` steps, Adam
    moves in PᵀG (or GP), and the matrix by ``scale`` times what P makes of that. The means stay when P changes, as in
    the authors' code.

    Attributes:
      rank: columns of P.
    """

    rank: int

    def init(self, array: Float[Array, "m n"]) -> ProjectedState:
        """Means of zero; the first step chooses the subspace."""
        m, n = array.shape
        small = jnp.zeros((self.rank, n) if m <= n else (m, self.rank), array.dtype)
        projector = jnp.zeros((min(m, n), self.rank), array.dtype)
        return ProjectedState(projector, AdamState(jnp.int32(0), small, small))

    def point(self, array: Float[Array, "m n"], state: ProjectedState, numbers: Numbers) -> Float[Array, "m n"]:
        """At the matrix."""
        return array

    def apply(
        self, gradient: Float[Array, "m n"], state: ProjectedState, array: Float[Array, "m n"], step: Step
    ) -> tuple[Float[Array, "m n"], ProjectedState]:
        """One step in the subspace."""
        period = jnp.asarray(step.numbers["period"], jnp.float32).astype(jnp.int32)
        p = followed(state.adam.steps % period == 0, gradient, state.projector)
        left = array.shape[0] <= array.shape[1]
        direction, adam = adam_direction(p.T @ gradient if left else gradient @ p, state.adam, step.numbers)
        direction = step.numbers["scale"] * (p @ direction if left else direction @ p.T)
        return step.along(array, direction), ProjectedState(p, adam)


@custom_vmap
def followed(
    due: Bool[Array, "*n"], gradient: Float[Array, "*n i o"], projector: Float[Array, "*n short rank"]
) -> Float[Array, "*n short rank"]:
    """The projectors, chosen anew by the gradient where that is due.

    A decomposition costs far more than a step, and under ``jax.vmap`` a branch for each of several would become a
    choice between two results that both are computed. So mapped once more, over layers or the slots of a population,
    this stays one branch: nothing is decomposed where no projector is due.
    """
    rank = projector.shape[-1]

    def anew(_: Any) -> Float[Array, "*n short rank"]:
        u, _, v = jnp.linalg.svd(gradient, full_matrices=False)
        leading = u[..., :rank] if gradient.shape[-2] <= gradient.shape[-1] else jnp.swapaxes(v, -1, -2)[..., :rank]
        return jnp.where(due[..., None, None], leading, projector)

    return lax.cond(jnp.any(due), anew, lambda _: projector, None)


@followed.def_vmap
def _followed_by_all(size: int, mapped: list[bool], *operands: Array) -> tuple[Array, bool]:
    whole = [
        operand if is_mapped else jnp.broadcast_to(operand, (size, *operand.shape))
        for operand, is_mapped in zip(operands, mapped, strict=True)
    ]
    return followed(*whole), True
