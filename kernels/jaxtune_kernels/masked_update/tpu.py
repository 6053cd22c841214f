"""The masked update as a Pallas kernel for TPUs: its grid runs over the selected blocks alone, in place.

The numbers of the blocks are prefetched as scalars, and the index maps of the pipeline read them: a grid step copies in
one tile of a selected block, its gradient and its moments, and copies the results back to where they came from. A byte
that belongs to no selected block takes part in no copy.

A tile is as wide as its block if that fits, because rows of a tiled memory lie side by side over their whole width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from jaxtune_kernels.masked_update.blocks import Blocks
from jaxtune_kernels.masked_update.operands import Operands, Results
from jaxtune_kernels.masked_update.rules import Coefficients, Corrections, UpdateRule, updated
from jaxtune_kernels.transforms import result

LANES = 128

# At most seven arrays of a tile are in flight, each twice, in four bytes: 14 MiB of a chip's 64 or 128.
_TILE_ELEMENTS = 256 * 1024
_TILE_COLUMNS = 16 * 1024
_VMEM_LIMIT = 40 * 1024 * 1024

# Vector registers hold 1,024 numbers each. What is worked on at once, this many columns of one tile of memory, is small
# enough for all values to stay in them: compiled for v5e, 8 × 1,024 float32 take 123 instruction bundles, 16 × 1,024
# bfloat16 with their random bits 325. At 1.5 GHz that is the pace of 2.8 and of 1.1 TB/s, where its memory has 0.8.
_CHUNK_COLUMNS = 1024

# The scalars are five words a slot and share about a megabyte with everything else that is prefetched.
_MOST_SLOTS = 32 * 1024


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a block falls into tiles, along rows and columns: the tile's size, and how many a block has."""

    tile: tuple[int, int]
    counts: tuple[int, int]


def masked_update_tpu(rule: UpdateRule, blocks: Blocks, operands: Operands, *, interpret: Any = False) -> Results:
    """See :func:`jaxtune_kernels.masked_update.reference.masked_update_reference`.

    Raises:
      ValueError: the blocks do not lie on the tiles of the memory; see :func:`unsupported`.
    """
    if reason := unsupported(blocks, operands):
        raise ValueError(f"the TPU kernel cannot update blocks of {blocks.block}: {reason}")
    groups, slots = operands.slots.blocks.shape
    blocks = dataclasses.replace(blocks, leading=(groups * math.prod(blocks.leading),))
    tiling = _tiling(blocks, _granule(operands))
    matrices = (blocks.leading[0], blocks.rows, blocks.columns)
    in_slots = (groups * slots, *blocks.block)
    params = operands.params.reshape(matrices)
    grads = operands.grads.reshape(matrices if operands.whole_grads else in_slots)
    moments = [m.reshape(in_slots) for m in operands.moments]
    scalars = _scalars(operands, blocks.count // groups)

    in_tensor = pl.BlockSpec((1, *tiling.tile), functools.partial(_tile_of_tensor, blocks, tiling))
    in_slot = pl.BlockSpec((1, *tiling.tile), functools.partial(_tile_of_slot, blocks, tiling))
    first = len(scalars)
    aliases = {first: 0, **{first + 2 + i: 1 + i for i in range(len(moments))}}
    new, *moments = pl.pallas_call(
        functools.partial(_kernel, rule, blocks, tiling, _granule(operands), slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(groups * slots, *tiling.counts),
            in_specs=[in_tensor, in_tensor if operands.whole_grads else in_slot, *[in_slot] * len(moments)],
            out_specs=[in_tensor, *[in_slot] * len(moments)],
        ),
        out_shape=[result(v.shape, v.dtype, v) for v in (params, *moments)],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            # Blocks are apart, so a chip with two cores may share them out. Tiles outside the tensor lean on order.
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT,
        ),
        cost_estimate=operands.cost(),
        interpret=interpret,
        name="masked_update",
    )(*scalars, params, grads, *moments)
    return operands.results(new, moments)


def unsupported(blocks: Blocks, operands: Operands) -> str | None:
    """Why the kernel cannot take these blocks, or None: they must lie on the tiles of a TPU's memory."""
    granule = _granule(operands)
    if blocks.block_rows != blocks.rows and blocks.block_rows % granule:
        return f"rows must be a multiple of {granule}, or all {blocks.rows}"
    if blocks.block_columns != blocks.columns and blocks.block_columns % LANES:
        return f"columns must be a multiple of {LANES}, or all {blocks.columns}"
    if (slots := operands.slots.blocks.shape[1]) > blocks.count:
        return f"{slots} are selected, but there are {blocks.count}"
    if (slots := math.prod(operands.slots.blocks.shape)) > _MOST_SLOTS:
        return f"{slots} blocks are more than {_MOST_SLOTS}"
    return None


def _granule(operands: Operands) -> int:
    """Rows that a tile of memory has: eight words, or sixteen halves of words."""
    narrow = any(value.dtype.itemsize == 2 for value in (operands.params, operands.grads, *operands.moments))
    return 16 if narrow else 8


def _tiling(blocks: Blocks, granule: int) -> Tiling:
    columns = _side(blocks.block_columns, blocks.columns, LANES, _TILE_COLUMNS)
    lanes = -(-columns // LANES) * LANES
    rows = _side(blocks.block_rows, blocks.rows, granule, max(granule, _TILE_ELEMENTS // lanes))
    return Tiling((rows, columns), (-(-blocks.block_rows // rows), -(-blocks.block_columns // columns)))


def _side(part: int, whole: int, granule: int, most: int) -> int:
    """A tile's size along one dimension, at most ``most``.

    A tile must divide a block that has neighbours, for the next block to start at a tile. One that is alone may have a
    last tile that sticks out of the tensor, where the pipeline copies what is inside.
    """
    if part <= most:
        return part
    if part == whole:
        tiles = -(-part // most)
        return -(-part // (tiles * granule)) * granule
    return _largest_part(part, granule, most)


def _largest_part(whole: int, granule: int, most: int) -> int:
    """The largest multiple of ``granule``, at most ``most``, that divides ``whole``."""
    return max(size for size in range(granule, most + 1, granule) if whole % size == 0)


def _scalars(operands: Operands, blocks_each: int) -> list[jax.Array]:
    """What the scalar core needs, as vectors: in its memory, a second dimension would be padded to 128."""
    slots = operands.slots
    shifted = _places(slots.blocks, blocks_each)
    words = [lax.bitcast_convert_type(v, jnp.int32) for v in (slots.first_rows, slots.first_columns, operands.seeds)]
    vectors = (shifted, *words, slots.first_corrections, slots.second_corrections, operands.coefficients)
    return [v.reshape(-1) for v in vectors]


def _places(numbers: Int32[Array, "g n"], blocks_each: int) -> Int32[Array, "g n"]:
    """The block that each slot works on, counted through all groups; inverted (``~``) where it must stay as it is.

    The pipeline copies some block out for each slot. So a slot whose number is that of no block is given one that no
    other slot has, of which there are enough, as long as there are no more slots than blocks.
    """

    def with_spares(numbers: Array) -> Array:
        groups = jnp.arange(numbers.shape[0])[:, None]
        taken = jnp.zeros((numbers.shape[0], blocks_each), bool).at[groups, numbers].set(True, mode="drop")
        spares = jnp.argsort(taken, axis=1, stable=True).astype(jnp.int32)
        lost = numbers >= blocks_each
        spare = jnp.take_along_axis(spares, jnp.maximum(jnp.cumsum(lost, axis=1) - 1, 0), axis=1)
        return jnp.where(lost, ~(spare + first), numbers + first)

    first = blocks_each * jnp.arange(numbers.shape[0], dtype=jnp.int32)[:, None]
    return lax.cond(jnp.all(numbers < blocks_each), lambda numbers: numbers + first, with_spares, numbers)


def _step(blocks: Blocks, tiling: Tiling, slot: Any, row: Any, column: Any, indices: Any) -> tuple[Any, ...]:
    """The tile of a grid step, as (matrix, first tile of its block, tile in the block, whether it is inside at all).

    Tiles outside the tensor, which only a block that sticks out has, stay with the last tile before them that is
    inside: then nothing is copied in or out for them.
    """
    matrix, i, j = blocks.coordinates(_block(indices, slot))
    starts = (i * tiling.counts[0], j * tiling.counts[1])
    if not blocks.ragged:
        return matrix, starts, (row, column), True
    last = [
        jnp.minimum(count - 1, -(-side // tile) - 1 - start)
        for count, side, tile, start in zip(
            tiling.counts, (blocks.rows, blocks.columns), tiling.tile, starts, strict=True
        )
    ]
    below, beside = row > last[0], column > last[1]
    inside = ~(below | beside)
    return matrix, starts, (jnp.where(below, last[0], row), jnp.where(inside, column, last[1])), inside


def _block(indices: Any, slot: Any) -> Any:
    return jnp.where(indices[slot] < 0, ~indices[slot], indices[slot])


def _tile_of_tensor(blocks: Blocks, tiling: Tiling, slot: Any, row: Any, column: Any, indices: Any, *_: Any) -> Any:
    matrix, starts, tile, _ = _step(blocks, tiling, slot, row, column, indices)
    return matrix, starts[0] + tile[0], starts[1] + tile[1]


def _tile_of_slot(blocks: Blocks, tiling: Tiling, slot: Any, row: Any, column: Any, indices: Any, *_: Any) -> Any:
    return slot, *_step(blocks, tiling, slot, row, column, indices)[2]


def _kernel(rule: UpdateRule, blocks: Blocks, tiling: Tiling, granule: int, slots: int, *refs: Any) -> None:
    (indices, first_rows, first_columns, seeds, first, second, coefficients), arrays = refs[:7], refs[7:]
    p_in, g_in, *m_in = arrays[: 2 + rule.moments]
    p_out, *m_out = arrays[2 + rule.moments :]
    slot = pl.program_id(0)
    group = lax.div(slot, jnp.int32(slots))
    row, column = pl.program_id(1) * tiling.tile[0], pl.program_id(2) * tiling.tile[1]
    scalars = Coefficients(*(coefficients[group * 6 + i] for i in range(6)))
    factors = Corrections(first[slot], second[slot])
    seed = seeds[group].astype(jnp.uint32)
    _, i, j = blocks.coordinates(_block(indices, slot))

    def update(at: tuple[Any, Any], shape: tuple[int, int]) -> None:
        place = (0, pl.ds(at[0], shape[0]), pl.ds(at[1], shape[1]))
        down = row + at[0] + lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        across = column + at[1] + lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
        new, moments = updated(
            rule, p_in[place], g_in[place], tuple(m[place] for m in m_in), scalars, factors, seed,
            (first_rows[slot] + down).astype(jnp.uint32), (first_columns[slot] + across).astype(jnp.uint32),
        )  # fmt: skip
        p_out[place] = new
        for out, value in zip(m_out, moments, strict=True):
            if blocks.ragged:
                inside = (i * blocks.block_rows + down < blocks.rows) & (
                    j * blocks.block_columns + across < blocks.columns
                )
                value = jnp.where(inside, value, jnp.zeros_like(value))
            out[place] = value

    def keep(at: tuple[Any, Any], shape: tuple[int, int]) -> None:
        place = (0, pl.ds(at[0], shape[0]), pl.ds(at[1], shape[1]))
        for out, value in zip((p_out, *m_out), (p_in, *m_in), strict=True):
            out[place] = value[place]

    inside = _step(blocks, tiling, slot, pl.program_id(1), pl.program_id(2), indices)[3]
    for selected, work in ((indices[slot] >= 0, update), (indices[slot] < 0, keep)):
        pl.when(selected & inside)(functools.partial(_in_chunks, tiling.tile, granule, work))


def _in_chunks(tile: tuple[int, int], granule: int, update: Any) -> None:
    """Calls ``update(first element, shape)`` for pieces of a tile that fit the registers."""
    width, height = tile[1], tile[0]
    if width % LANES == 0:
        width = _largest_part(width, LANES, _CHUNK_COLUMNS)
    if height % granule == 0:
        # Narrow tiles are worked on by more rows at once: enough independent numbers to hide an operation's latency.
        height = _largest_part(height, granule, max(granule, granule * _CHUNK_COLUMNS // width))
    across = tile[1] // width

    @pl.loop(0, tile[0] // height * across)
    def _(number: Any) -> None:
        piece, columns = jnp.int32(number), jnp.int32(across)
        at = lax.div(piece, columns) * height, lax.rem(piece, columns) * width
        update((pl.multiple_of(at[0], height), pl.multiple_of(at[1], width)), (height, width))
