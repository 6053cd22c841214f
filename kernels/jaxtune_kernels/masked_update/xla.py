"""The masked update for every platform, as a gather and a scatter of windows.

XLA scatters into a donated operand in place, so unselected bytes are neither read nor written. But the new values of
the selected blocks go through memory on their way from the update to the scatter; on TPUs, where gather and scatter are
loops over blocks, the old ones do on their way from the gather as well.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from jaxtune_kernels.masked_update.blocks import Blocks
from jaxtune_kernels.masked_update.operands import Operands, Results, slot_terms
from jaxtune_kernels.masked_update.rules import UpdateRule, updated


def masked_update_xla(rule: UpdateRule, blocks: Blocks, operands: Operands) -> Results:
    """See :func:`jaxtune_kernels.masked_update.reference.masked_update_reference`."""
    indices = operands.slots.blocks
    old = jax.vmap(lambda tensor, selected: take(blocks, tensor, selected))(operands.params, indices)
    grads = operands.grads
    if operands.whole_grads:
        grads = jax.vmap(lambda tensor, selected: take(blocks, tensor, selected))(grads, indices)
    new, moments = updated(rule, old, grads, operands.moments, *slot_terms(operands))
    if blocks.ragged:
        inside = _inside(blocks, indices)
        moments = tuple(jnp.where(inside, m, 0) for m in moments)
    selected = (indices < blocks.count)[..., None, None]
    moments = tuple(jnp.where(selected, new, old) for new, old in zip(moments, operands.moments, strict=True))
    # Fused into one loop, a gather from and a scatter into the same memory make XLA work on a copy of it.
    new = lax.optimization_barrier(new)
    params = jax.vmap(lambda tensor, selected, values: put(blocks, tensor, selected, values))(
        operands.params, indices, new
    )
    return params, moments


def take(blocks: Blocks, tensor: Array, indices: Int32[Array, " n"]) -> Array:
    """Blocks of ``tensor`` by number, ``[n, block rows, block columns]``; zeros where they stick out."""
    starts, (rows, columns) = _windows(blocks, indices)
    dimensions = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2))
    windows = lax.gather(
        tensor.reshape(-1, blocks.rows, blocks.columns),
        starts,
        dimensions,
        (1, rows, columns),
        mode=lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
        unique_indices=True,
    )
    cut = windows.reshape(-1, blocks.block_rows // rows, blocks.block_columns // columns, rows, columns)
    return cut.swapaxes(2, 3).reshape(-1, *blocks.block)


def put(blocks: Blocks, tensor: Array, indices: Int32[Array, " n"], values: Array) -> Array:
    """``tensor`` with the given blocks replaced by ``values``, ``[n, block rows, block columns]``."""
    starts, (rows, columns) = _windows(blocks, indices)
    cut = values.reshape(-1, blocks.block_rows // rows, rows, blocks.block_columns // columns, columns)
    return lax.scatter(
        tensor.reshape(-1, blocks.rows, blocks.columns),
        starts,
        cut.swapaxes(2, 3).reshape(-1, rows, columns),
        lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1, 2)
        ),
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    ).reshape(tensor.shape)


def _windows(blocks: Blocks, indices: Int32[Array, " n"]) -> tuple[Int32[Array, "w 3"], tuple[int, int]]:
    """Where to gather and scatter windows of which size, to cover the blocks and nothing outside the tensor.

    A window that sticks out is dropped as a whole, so ragged blocks fall into windows that divide the tensor as well:
    a window is then inside or outside. Without raggedness it is the block.
    """
    rows, columns = math.gcd(blocks.block_rows, blocks.rows), math.gcd(blocks.block_columns, blocks.columns)
    matrix, i, j = blocks.coordinates(indices)
    down = jnp.arange(0, blocks.block_rows, rows, dtype=jnp.int32)
    across = jnp.arange(0, blocks.block_columns, columns, dtype=jnp.int32)
    starts = jnp.broadcast_arrays(
        matrix[:, None, None],
        (i * blocks.block_rows)[:, None, None] + down[:, None],
        (j * blocks.block_columns)[:, None, None] + across,
    )
    return jnp.stack(starts, axis=-1).reshape(-1, 3), (rows, columns)


def _inside(blocks: Blocks, indices: Int32[Array, "g n"]) -> Bool[Array, "g n block_rows block_columns"]:
    """Which elements of the blocks lie in the tensor."""
    _, i, j = blocks.coordinates(indices)
    rows = (i * blocks.block_rows)[..., None] + jnp.arange(blocks.block_rows, dtype=jnp.int32)
    columns = (j * blocks.block_columns)[..., None] + jnp.arange(blocks.block_columns, dtype=jnp.int32)
    return (rows < blocks.rows)[..., :, None] & (columns < blocks.columns)[..., None, :]
