"""What every implementation of the masked update is given: a group of tensors of one shape, one for each trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, UInt32

from jaxtune_kernels.masked_update.rules import Coefficients, Corrections


class SelectedBlocks(NamedTuple):
    """A slot is the place of one selected block in the moments."""

    blocks: Int32[Array, "g n"]
    """The number of the block; where there is none, how many blocks there are."""
    first_rows: UInt32[Array, "g n"]
    """The identity of the block's first row in the whole tensor, for random bits."""
    first_columns: UInt32[Array, "g n"]
    """The identity of its first column."""
    first_corrections: Float[Array, "g n"]
    second_corrections: Float[Array, "g n"]


class Operands(NamedTuple):
    """The arrays of one update.

    The gradients are those of the selected blocks, ``[g, n, block rows, block columns]``, or of the whole tensors,
    which then have the parameters' shape.
    """

    params: Float[Array, "g *leading rows columns"]
    grads: Float[Array, " g *_"]
    moments: tuple[Float[Array, "g n block_rows block_columns"], ...]
    slots: SelectedBlocks
    coefficients: Float[Array, "g 6"]
    seeds: UInt32[Array, " g"]

    @property
    def whole_grads(self) -> bool:
        """Whether the gradients are those of the whole tensors."""
        return self.grads.shape == self.params.shape and self.grads.shape != self.moments[0].shape

    def bytes_touched(self) -> int:
        """What an update must read and write: of the selected blocks, parameters, gradients and moments."""
        elements = self.moments[0].size
        written = sum(value.dtype.itemsize for value in (self.params, *self.moments))
        return elements * (2 * written + self.grads.dtype.itemsize)

    def cost(self) -> pl.CostEstimate:
        """What XLA is told of a kernel that touches no more than it must."""
        elements = self.moments[0].size
        return pl.CostEstimate(flops=20 * elements, transcendentals=elements, bytes_accessed=self.bytes_touched())

    def results(self, params: Array, moments: Sequence[Array]) -> Results:
        """Parameters and moments that a kernel has worked on in another shape, shaped as here."""
        shaped = tuple(new.reshape(old.shape) for new, old in zip(moments, self.moments, strict=True))
        return params.reshape(self.params.shape), shaped


Results = tuple[Any, tuple[Any, ...]]
"""The parameters and the moments, shaped as in the operands."""


def slot_terms(operands: Operands) -> tuple[Coefficients, Corrections, Array, Array, Array]:
    """Coefficients, corrections, seeds and identities of rows and columns, to broadcast against the moments."""
    slots, (block_rows, block_columns) = operands.slots, operands.moments[0].shape[-2:]
    coefficients = Coefficients(*(operands.coefficients[:, i, None, None, None] for i in range(6)))
    factors = Corrections(slots.first_corrections[..., None, None], slots.second_corrections[..., None, None])
    rows = slots.first_rows[..., None] + jnp.arange(block_rows, dtype=jnp.uint32)
    columns = slots.first_columns[..., None] + jnp.arange(block_columns, dtype=jnp.uint32)
    return coefficients, factors, operands.seeds[:, None, None, None], rows[..., :, None], columns[..., None, :]
