"""What the two Hopper kernels of the low-rank matmul have in common: limits of the hardware, and work on blocks."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from jaxtune_kernels.dropout import keep_bits

# Streaming multiprocessors of an H100 SXM and of an H200.
MULTIPROCESSORS = 132
# What a block may take of a multiprocessor's 232,448 bytes: some are for barriers and for alignment.
SHARED_BYTES = 231_424
# TMA writes blocks in the tiles that wgmma reads, 8 rows of up to 128 bytes; an array consists of whole ones.
ROW_MULTIPLE, COLUMN_MULTIPLE, RANK_MULTIPLE = 8, 64, 16
# Two warpgroups multiply, each 64 rows at a time, the M of wgmma; a third one has TMA bring what they need.
CONSUMERS = 2
WARPGROUP_ROWS = 64
# Columns of a block of x: 128 bytes, the widest swizzle.
DEPTH = COLUMN_MULTIPLE

# Nothing is reduced over warps, so no scratch is kept for it.
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0)

# jax 0.10 asks for an index beside the reference; newer ones index the reference alone.
_load: Any = plgpu.load
if "idx" in inspect.signature(plgpu.load).parameters:
    _load = functools.partial(plgpu.load, idx=())


class MaskKeys(NamedTuple):
    """What the masks of all groups are drawn from."""

    rows: UInt32[Array, "g m"]
    columns: UInt32[Array, "g columns"]
    thresholds: UInt32[Array, " g"]


def keep_block(row_key: Array, column_key: Array, threshold: Array) -> Array:
    """The mask of a block in registers, for the keys of its rows and columns."""
    shape = (row_key.size, column_key.size)
    row, column = lax.broadcast_in_dim(row_key, shape, [0]), lax.broadcast_in_dim(column_key, shape, [1])
    return keep_bits(row, column, threshold)


def load_vector(reference: Any) -> Array:
    """A vector from shared memory, spread over the threads as the rows or the columns of a block are."""
    return _load(reference, optimized=False)


def swizzled(minor: int, dtype: Any) -> tuple[Any, ...]:
    """Tiling and swizzle of a block in shared memory whose rows have ``minor`` entries."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(minor * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def extended(array: Array, *multiples: int) -> Array:
    """Each of the last axes up to a multiple of the given size, with zeros; the array itself where nothing is added."""
    first = array.ndim - len(multiples)
    widths = [(0, -size % multiple) for size, multiple in zip(array.shape[first:], multiples, strict=True)]
    return jnp.pad(array, [(0, 0)] * first + widths) if any(after for _, after in widths) else array


def release_all(empty: Any, stages: int) -> None:
    """A consumer's first word: all stages are free."""
    for slot in range(stages):
        plgpu.barrier_arrive(empty.at[slot])


def drain(empty: Any, stages: int) -> None:
    """The producer's last: waits until all stages are free again."""
    for slot in range(stages):
        plgpu.barrier_wait(empty.at[slot])
