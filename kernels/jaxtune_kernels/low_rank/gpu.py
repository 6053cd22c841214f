"""The low-rank matmul for NVIDIA Hopper, in Pallas for Mosaic GPU: two launches for all groups of a population.

:mod:`hopper_down <jaxtune_kernels.low_rank.hopper_down>` makes ``h = z A`` (m × r) and reads x once.
:mod:`hopper_matmul <jaxtune_kernels.low_rank.hopper_matmul>` multiplies x by the frozen weight and adds h times B in
the same accumulator, so y is written once and never read.

TMA fills with zeros what a tile reads beyond an array's edge, and does not write beyond it, so shapes need not be whole
tiles. What it cannot do is part of a swizzle atom: the rows of a group are a multiple of 8, k and n of 64. Other shapes
work too, but XLA then extends x and W by zeros and cuts y, which copies them.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxtune_kernels.dropout import column_keys, drop_threshold, row_keys
from jaxtune_kernels.low_rank.hopper import (
    COLUMN_MULTIPLE,
    MULTIPROCESSORS,
    RANK_MULTIPLE,
    ROW_MULTIPLE,
    SHARED_BYTES,
    MaskKeys,
    extended,
)
from jaxtune_kernels.low_rank.hopper_down import down_projection
from jaxtune_kernels.low_rank.hopper_matmul import Tiles, frozen_matmul, tiles_for

# For each group its rate and seed, and an identity for each of its rows.
Dropout = tuple[Float[Array, " g"], UInt32[Array, " g"], UInt32[Array, "g m"]]

# The block of B for a tile stays in shared memory, beside at least three stages.
LARGEST_RANK = 128


def low_rank_product(
    x: Float[Array, "g m k"],
    w: Float[Array, "_ _"],
    a: Float[Array, "g k r"],
    b: Float[Array, "g r n"],
    scale: Float[Array, " g"],
    bias: Float[Array, " n"] | None,
    dropout: Dropout | None,
    *,
    transposed: bool,
    drop: Literal["input", "output"],
    first_column: UInt32[Array, ""] | int = 0,
    tiles: Tiles | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> tuple[Float[Array, "g m n"], Float[Array, "g m r"]]:
    """``y = x W + low-rank term + bias`` and ``h``, for g adapters over one W.

    With ``drop="input"``, the forward pass: ``z = mask(x) / (1 - rate)``, ``h = z a``, ``y = x W + scale h b + bias``.
    With ``drop="output"``, the backward pass: ``h = x a``, ``y = x W + mask((scale / (1 - rate) h) b) + bias``.

    Sums are float32; h is rounded to x's dtype before it meets b. Besides W and x, which are read by TMA where they
    lie, XLA casts a and b to x's dtype, scales b, and turns a so that its rows run along k.

    Args:
      x: bfloat16 or float16.
      w: [k, n], or [n, k] with ``transposed``, in x's dtype; it is not copied.
      a: cast to x's dtype; r is at most 128.
      b: cast to x's dtype.
      scale: the factor on each group's low-rank term.
      bias: added to y, in float32.
      dropout: rate, seed and an identity for each row; the bits are those of
        :func:`jaxtune_kernels.dropout.keep_mask`, over k columns or, on the output, n.
      transposed: how W lies.
      drop: where the mask sits.
      first_column: the index, in the whole array, of the first column that the mask is drawn for, where that dimension
        is cut over devices.
      tiles: by default :func:`tiles_for` the shape.
      multiprocessors: of the device; persistent blocks to launch.

    Returns:
      y and h, in x's dtype.

    Raises:
      ValueError: a dtype or a rank that the kernel does not take, or tiles that do not fit in shared memory.
    """
    groups, m, _ = x.shape
    n, rank = b.shape[2], a.shape[2]
    if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
        raise ValueError(f"x and w must both be bfloat16 or float16 for the Hopper kernel, not {x.dtype} and {w.dtype}")
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"the Hopper kernel takes ranks from 1 to {LARGEST_RANK}, not {rank}")
    vectors = (bias is not None) + (dropout is not None and drop == "output")
    tiles = tiles or tiles_for(groups * m, n, rank, vectors, multiprocessors)
    if (needed := tiles.shared_bytes(rank, vectors)) > SHARED_BYTES:
        raise ValueError(f"{tiles} take {needed} bytes of shared memory at rank {rank}, of {SHARED_BYTES}")
    if not groups * m * n:
        return jnp.zeros((groups, m, n), x.dtype), jnp.zeros((groups, m, rank), x.dtype)
    keys = boost = None
    if dropout is not None:
        rate, seed, rows = dropout
        columns = x.shape[2] if drop == "input" else n
        keys = MaskKeys(
            row_keys(seed[:, None], extended(rows, ROW_MULTIPLE)),
            extended(column_keys(seed, columns, first_column), COLUMN_MULTIPLE),
            drop_threshold(rate),
        )
        boost = 1.0 / (1.0 - rate)
        scale = scale if drop == "input" else scale * boost
    if bias is not None:
        bias = extended(bias.astype(jnp.float32), COLUMN_MULTIPLE)
    a = extended(jnp.swapaxes(a, 1, 2).astype(x.dtype), RANK_MULTIPLE, COLUMN_MULTIPLE)
    b = extended((scale[:, None, None] * b).astype(x.dtype), RANK_MULTIPLE, COLUMN_MULTIPLE)
    x, w = extended(x, ROW_MULTIPLE, COLUMN_MULTIPLE), extended(w, COLUMN_MULTIPLE, COLUMN_MULTIPLE)
    h = down_projection(x, a, *((keys, boost) if drop == "input" else (None, None)))
    y = frozen_matmul(
        x,
        w,
        h,
        b,
        bias,
        keys if drop == "output" else None,
        transposed=transposed,
        tiles=tiles,
        multiprocessors=multiprocessors,
    )
    return y[:, :m, :n], h[:, :m, :rank]
