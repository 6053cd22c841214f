"""How a tensor is cut into blocks: its last two dimensions into rectangles, its other dimensions one by one.

A tensor keeps its shape. Merging or splitting its last two dimensions would copy it on a TPU, where memory is tiled
over them; dimensions before those two merge for free. So ``[layers, rows, columns]`` with blocks of ``(rows, columns)``
is a row of layers, ``(k, columns)`` are groups of k rows, ``(rows, k)`` groups of k columns, ``(k, k)`` tiles, and all
of them are one code. Blocks are numbered in row-major order over (leading dimensions, block row, block column). Where
the block does not divide the tensor, the last ones stick out; what sticks out exists in the moments only, as zeros.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Which blocks of a tensor are trained.

    Attributes:
      indices: int32 ``[n]``, numbers of the selected blocks, each once, in ascending order; a number outside the tensor
        selects nothing. Their count is static, they are traced. None selects all blocks for good: then nothing is
        gathered or scattered.
      block: rows and columns of a block; None is all there are, so the default selects among the leading dimensions,
        and with one index of zero a matrix as a whole.
    """

    # A tree of arrays is also one of shapes, of shardings, of axes to map over.
    indices: Any
    block: tuple[int | None, int | None] = dataclasses.field(default=(None, None), metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a ``[*leading, rows, columns]`` tensor."""

    leading: tuple[int, ...]
    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...], block: tuple[int | None, int | None]) -> Blocks:
        """Cuts a tensor; a vector counts as one row.

        Raises:
          ValueError: a block is empty, or larger than the tensor.
        """
        *leading, rows, columns = (1,) * (2 - len(shape)) + tuple(shape)
        size = tuple(whole if part is None else part for part, whole in zip(block, (rows, columns), strict=True))
        if not (1 <= size[0] <= rows and 1 <= size[1] <= columns):
            raise ValueError(f"a block of {size} does not fit a tensor whose last two dimensions are {(rows, columns)}")
        return cls(tuple(leading), rows, columns, *size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's, at least two-dimensional."""
        return (*self.leading, self.rows, self.columns)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.block_rows, self.block_columns

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are along each dimension."""
        return (*self.leading, -(-self.rows // self.block_rows), -(-self.columns // self.block_columns))

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return math.prod(self.grid)

    @property
    def is_row_of_matrices(self) -> bool:
        """Whether each block is a whole matrix, so that the tensor and all of its blocks differ in shape alone."""
        return self.block == (self.rows, self.columns)

    @property
    def ragged(self) -> bool:
        """Whether blocks stick out of the tensor."""
        return bool(self.rows % self.block_rows or self.columns % self.block_columns)

    def coordinates(self, indices: Int32[Array, "*n"]) -> tuple[Array, Array, Array]:
        """Of each block: its matrix among the leading dimensions, its block row, its block column."""
        *_, block_rows, block_columns = self.grid
        # Not //, which looks at signs: kernels divide with this as well.
        strip = lax.div(indices, jnp.int32(block_columns))
        return (
            lax.div(strip, jnp.int32(block_rows)),
            lax.rem(strip, jnp.int32(block_rows)),
            lax.rem(indices, jnp.int32(block_columns)),
        )

    def first_elements(self, indices: Int32[Array, "*n"]) -> tuple[UInt32[Array, "*n"], UInt32[Array, "*n"]]:
        """Of each block, the row (counted through all matrices) and the column of its first element."""
        matrix, i, j = self.coordinates(indices)
        row = matrix.astype(jnp.uint32) * jnp.uint32(self.rows) + (i * self.block_rows).astype(jnp.uint32)
        return row, (j * self.block_columns).astype(jnp.uint32)

    def split(self, tensor: Array) -> Array:
        """``[*shape]`` as ``[count, block_rows, block_columns]``, zeros where blocks stick out. Copies."""
        *_, i, j = self.grid
        pad = (i * self.block_rows - self.rows, j * self.block_columns - self.columns)
        padded = jnp.pad(tensor.reshape(-1, self.rows, self.columns), ((0, 0), (0, pad[0]), (0, pad[1])))
        cut = padded.reshape(-1, i, self.block_rows, j, self.block_columns)
        return cut.swapaxes(2, 3).reshape(self.count, *self.block)

    def join(self, blocks: Array) -> Array:
        """The inverse of :meth:`split`. Copies."""
        *_, i, j = self.grid
        cut = blocks.reshape(-1, i, j, *self.block).swapaxes(2, 3)
        whole = cut.reshape(-1, i * self.block_rows, j * self.block_columns)
        return whole[:, : self.rows, : self.columns].reshape(self.shape)
