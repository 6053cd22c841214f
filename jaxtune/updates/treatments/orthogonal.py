"""LoRA from an orthogonal start: neither A nor B is zero, and their product is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from jaxtune.late import TYPES, jax, jnp
from jaxtune.updates.treatments.base import Arrays, Values
from jaxtune.updates.treatments.low_rank import LowRank, RankRule

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Key

_SIZE = 0.1


class OrthogonalRule(RankRule):
    """Linear layers that get a low-rank term of which neither factor starts at zero."""

    method: Literal["orthogonal"] = Field(
        default="orthogonal",
        description="These linear layers get a low-rank term of which neither factor starts at zero.",
    )


class Orthogonal(LowRank):
    """LoRA whose A and B start as ``U Q₁`` and ``Q₂ V``, U and V normal, Q₁ and Q₂ rows of one orthogonal matrix.

    So A B is zero, and both have gradients from the first step on. The matrix is made of blocks ``[1 1; 1 −1] / √2``:
    each pair of columns cancels by itself, at any even rank that a mask leaves and in any dtype. Of an odd rank the
    last row of B is zero.
    """

    Section = OrthogonalRule

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Pairs of columns, and of rows."""
        del base
        pairs = -(-self.capacity // 2)
        size = _SIZE / jnp.sqrt(2.0)
        ends = self.inputs, self.inputs + self.outputs

        def draw(one: Key[Array, ""]) -> Array:
            return size * jax.random.normal(one, (ends[1],), jnp.float32)

        drawn = jnp.repeat(self.drawn(key, pairs, draw), 2, axis=-1)[..., : self.capacity]
        columns = jnp.arange(self.capacity)
        rank = self.gathered("rank", values)[:, None]
        lonely = (columns == rank - 1) & (columns % 2 == 0)
        sign = jnp.where(lonely, 0.0, jnp.where(columns % 2 == 0, 1.0, -1.0))
        b = drawn[..., ends[0] :, :] * self.of_layers(sign[:, None])
        return {"a": drawn[..., : ends[0], :], "b": b.mT}, {}
