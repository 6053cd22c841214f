"""The masked update as a Pallas kernel for NVIDIA GPUs, by way of Triton, in place.

A program updates one tile of a selected block: it loads each byte once, straight into registers, and stores it once.
There is nothing that a second program would reuse, so tiles staged in shared memory by asynchronous copies, which
Mosaic GPU is made for, would only be a detour. What a kernel bound by memory needs is bytes under way: by Little's law
an H200 has to have 4.8 TB/s times some 800 ns, about 4 MB or 29 KB a multiprocessor, on the road. A program asks for
2,048 elements of four arrays, 16 KB in bfloat16 and 32 KB in float32; compiled, its 256 threads take 40 registers each,
so that a multiprocessor holds six. Loads and stores are sixteen bytes wide where the block's columns divide by eight.

In bfloat16 throughout, instructions are the next bound: an H200 moves 14 bytes an element in the time of some 80
instructions a thread, so the hash of the stochastic rounding is drawn once for all three roundings.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxtune_kernels.masked_update.blocks import Blocks
from jaxtune_kernels.masked_update.operands import Operands, Results
from jaxtune_kernels.masked_update.rules import Coefficients, Corrections, UpdateRule, updated
from jaxtune_kernels.transforms import result

_TILE_ELEMENTS = 2048
_WARPS = 8


def masked_update_gpu(rule: UpdateRule, blocks: Blocks, operands: Operands, *, interpret: Any = False) -> Results:
    """See :func:`jaxtune_kernels.masked_update.reference.masked_update_reference`."""
    groups, slots = operands.slots.blocks.shape
    matrices = (groups * math.prod(blocks.leading), blocks.rows, blocks.columns)
    in_slots = (groups * slots, *blocks.block)
    params = operands.params.reshape(matrices)
    grads = operands.grads.reshape(matrices if operands.whole_grads else in_slots)
    moments = [m.reshape(in_slots) for m in operands.moments]
    tile = _tile(blocks)
    tiles = (-(-blocks.block_rows // tile[0]), -(-blocks.block_columns // tile[1]))
    scalars = [v.reshape(-1) for v in (*operands.slots, operands.seeds, operands.coefficients)]
    first = len(scalars)
    new, *moments = pl.pallas_call(
        functools.partial(_kernel, rule, blocks, tile, tiles, slots, operands.whole_grads),
        grid=(groups * slots * tiles[0] * tiles[1],),
        out_shape=[result(v.shape, v.dtype, v) for v in (params, *moments)],
        input_output_aliases={first: 0, **{first + 2 + i: 1 + i for i in range(len(moments))}},
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        cost_estimate=operands.cost(),
        interpret=interpret,
        name="masked_update",
    )(*scalars, params, grads, *moments)
    return operands.results(new, moments)


def _tile(blocks: Blocks) -> tuple[int, int]:
    """Powers of two, as Triton wants them: as wide as the block's rows are long, up to the whole tile."""
    columns = min(_TILE_ELEMENTS, pl.next_power_of_2(blocks.block_columns))
    return min(_TILE_ELEMENTS // columns, pl.next_power_of_2(blocks.block_rows)), columns


def _kernel(
    rule: UpdateRule,
    blocks: Blocks,
    tile: tuple[int, int],
    tiles: tuple[int, int],
    slots: int,
    whole_grads: bool,
    *refs: Any,
) -> None:
    (indices, first_rows, first_columns, first, second, seeds, coefficients), arrays = refs[:7], refs[7:]
    p_in, g_in, *m_in = arrays[: 2 + rule.moments]
    p_out, *m_out = arrays[2 + rule.moments :]
    step = pl.program_id(0)
    strip, column = lax.div(step, jnp.int32(tiles[1])), lax.rem(step, jnp.int32(tiles[1])) * tile[1]
    slot, row = lax.div(strip, jnp.int32(tiles[0])), lax.rem(strip, jnp.int32(tiles[0])) * tile[0]
    group = lax.div(slot, jnp.int32(slots))
    block = indices[slot]
    matrix, i, j = blocks.coordinates(block)
    top, left = i * blocks.block_rows, j * blocks.block_columns

    down = row + lax.broadcasted_iota(jnp.int32, (tile[0], 1), 0)
    across = column + lax.broadcasted_iota(jnp.int32, (1, tile[1]), 1)
    in_block = (down < blocks.block_rows) & (across < blocks.block_columns)
    in_tensor = in_block & (top + down < blocks.rows) & (left + across < blocks.columns)
    # A number behind the last block selects nothing.
    in_tensor &= block < blocks.count
    here = (group * math.prod(blocks.leading) + matrix, pl.ds(top + row, tile[0]), pl.ds(left + column, tile[1]))
    there = (slot, pl.ds(row, tile[0]), pl.ds(column, tile[1]))

    def load(ref: Any, place: tuple[Any, ...]) -> Any:
        return plgpu.load(ref.at[place], mask=in_tensor, other=jnp.zeros((), ref.dtype))

    new, moments = updated(
        rule,
        load(p_in, here),
        load(g_in, here if whole_grads else there),
        tuple(load(m, there) for m in m_in),
        Coefficients(*(coefficients[group * 6 + n] for n in range(6))),
        Corrections(first[slot], second[slot]),
        seeds[group],
        first_rows[slot] + down.astype(jnp.uint32),
        first_columns[slot] + across.astype(jnp.uint32),
    )
    plgpu.store(p_out.at[here], new, mask=in_tensor)
    for ref, value in zip(m_out, moments, strict=True):
        plgpu.store(ref.at[there], value, mask=in_tensor)
