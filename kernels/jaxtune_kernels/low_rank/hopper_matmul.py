"""The second of the two Hopper kernels of the low-rank matmul: the frozen weight, and from m × r up to m × n.

A warp-specialised matmul: the producer warpgroup keeps a ring of stages in shared memory filled by TMA, and two
consumer warpgroups feed them to wgmma, 64 rows each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxtune_kernels.low_rank.hopper import (
    COMPILER_PARAMS,
    CONSUMERS,
    DEPTH,
    MULTIPROCESSORS,
    RANK_MULTIPLE,
    SHARED_BYTES,
    WARPGROUP_ROWS,
    MaskKeys,
    drain,
    keep_block,
    load_vector,
    release_all,
    swizzled,
)
from jaxtune_kernels.transforms import result

# Column tiles that blocks at work at the same time have in common with as many rows: 132 blocks are about 16 × 8 tiles.
_SNAKE = 8


class Tiles(NamedTuple):
    """How ``frozen_matmul`` is cut.

    Attributes:
      columns: of one tile of y; a tile has 128 rows, 64 for each consumer.
      stages: of the ring, each with a [128, 64] block of x and a [64, columns] block of W.
      chunk: columns that the epilogue converts and stores at a time.
    """

    columns: int
    stages: int
    chunk: int

    @property
    def rows(self) -> int:
        """Rows of one tile of y."""
        return CONSUMERS * WARPGROUP_ROWS

    def shared_bytes(self, rank: int, vectors: int = 1) -> int:
        """Bytes of shared memory, for operands of two bytes and vectors of columns: a bias, the keys of a mask."""
        stages = self.stages * (self.rows + self.columns) * DEPTH
        low_rank = RANK_MULTIPLE * pl.cdiv(rank, RANK_MULTIPLE) * (self.rows + self.columns)
        return 2 * (stages + low_rank + 2 * self.rows * self.chunk) + 4 * (self.rows + vectors * self.columns)


def tiles_for(rows: int, columns: int, rank: int, vectors: int = 1, multiprocessors: int = MULTIPROCESSORS) -> Tiles:
    """The tiles for a product of ``rows`` × ``columns``, all groups together.

    Of 128 × 256 and 128 × 128 it takes the one whose waves over the multiprocessors cost less. A multiply-accumulate
    of the small tile counts 1.1, since it reads more shared memory; that number is assumed, not measured. A rank whose
    blocks leave no room for three stages beside a wide tile takes the narrow one.
    """

    def fitting(width: int) -> Tiles | None:
        options = (Tiles(width, stages, chunk) for stages in (4, 3) for chunk in (64, 32))
        return next((tiles for tiles in options if tiles.shared_bytes(rank, vectors) <= SHARED_BYTES), None)

    def cost(tiles: Tiles) -> float:
        count = pl.cdiv(rows, tiles.rows) * pl.cdiv(columns, tiles.columns)
        return pl.cdiv(count, multiprocessors) * tiles.columns * (1.0 if tiles.columns == 256 else 1.1)

    return min((tiles for tiles in (fitting(256), fitting(128)) if tiles is not None), key=cost)


def frozen_matmul(
    x: Float[Array, "g m k"],
    w: Float[Array, "_ _"],
    h: Float[Array, "g m r"],
    b: Float[Array, "g r n"],
    bias: Float[Array, " n"] | None,
    keys: MaskKeys | None,
    *,
    transposed: bool,
    tiles: Tiles,
    multiprocessors: int,
) -> Float[Array, "g m n"]:
    """``y = x W + mask(h b) + bias`` in x's dtype, in one launch for all groups.

    Persistent: a block takes every ``multiprocessors``-th tile, in an order in which neighbours share rows of x and
    columns of W in L2. The producer does not stop between tiles, so the next one's first stages arrive during an
    epilogue. The low-rank term is a last, short K-step of the accumulator that holds x W. Where a mask sits on it, it
    has an accumulator of its own instead, for one chunk of columns at a time, in the epilogue.

    Args:
      x: m a multiple of 8 and k of 64.
      w: [k, n], or [n, k] with ``transposed``; n a multiple of 64.
      b: r a multiple of 16, scaled.
      bias: float32.
      keys: of masks over n columns; None for no mask.
    """
    groups, m, k = x.shape
    _, rank, n = b.shape
    steps = pl.cdiv(k, DEPTH)
    row_tiles, column_tiles = pl.cdiv(m, tiles.rows), pl.cdiv(n, tiles.columns)
    masked = keys is not None

    def body(
        x_ref: Any, w_ref: Any, h_ref: Any, b_ref: Any, bias_ref: Any, keys_ref: Any, y_ref: Any,
        *, x_ring: Any, w_ring: Any, h_block: Any, b_block: Any, bias_block: Any, row_block: Any, key_block: Any,
        out: Any, full: Any, empty: Any, last_full: Any, last_empty: Any,
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        def over_tiles(function: Any) -> None:
            """Calls ``function(group, first row, first column, steps of the ring before this tile)``."""

            @plgpu.nd_loop((groups * row_tiles * column_tiles,), collective_axes="block")
            def _tile(loop: Any) -> None:
                (index,) = loop.index
                row_tile, column_tile = plgpu.planar_snake(index, (groups * row_tiles, column_tiles), 1, _SNAKE)
                first_row = lax.rem(row_tile, row_tiles) * tiles.rows
                function(lax.div(row_tile, row_tiles), first_row, column_tile * tiles.columns, loop.local_index * steps)

        @pl.when(warpgroup == CONSUMERS)
        def _produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @over_tiles
            def _tile(group: Array, first_row: Array, first_column: Array, before: Array) -> None:
                rows, columns = pl.ds(first_row, tiles.rows), pl.ds(first_column, tiles.columns)

                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    slot = lax.rem(before + step, tiles.stages)
                    depth = pl.ds(step * DEPTH, DEPTH)
                    plgpu.barrier_wait(empty.at[slot])
                    plgpu.copy_gmem_to_smem(x_ref.at[group, rows, depth], x_ring.at[slot], full.at[slot])
                    block = w_ref.at[columns, depth] if transposed else w_ref.at[depth, columns]
                    plgpu.copy_gmem_to_smem(block, w_ring.at[slot], full.at[slot])

                plgpu.barrier_wait(last_empty)
                plgpu.copy_gmem_to_smem(h_ref.at[group, rows], h_block, last_full)
                plgpu.copy_gmem_to_smem(b_ref.at[group, :, columns], b_block, last_full)
                if bias is not None:
                    plgpu.copy_gmem_to_smem(bias_ref.at[columns], bias_block, last_full)
                if masked:
                    plgpu.copy_gmem_to_smem(keys_ref.rows.at[group, rows], row_block, last_full)
                    plgpu.copy_gmem_to_smem(keys_ref.columns.at[group, columns], key_block, last_full)

            drain(empty, tiles.stages)
            plgpu.barrier_wait(last_empty)

        @pl.when(warpgroup != CONSUMERS)
        def _consume() -> None:
            plgpu.set_max_registers(232, action="increase")
            release_all(empty, tiles.stages)
            plgpu.barrier_arrive(last_empty)
            own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            @over_tiles
            def _tile(group: Array, first_row: Array, first_column: Array, before: Array) -> None:
                threshold: Any = keys_ref.thresholds[group] if masked else None

                def accumulate(accumulator: Any) -> Array:
                    @pl.loop(0, steps)
                    def _step(step: Array) -> None:
                        slot = lax.rem(before + step, tiles.stages)
                        plgpu.barrier_wait(full.at[slot])
                        right = w_ring.at[slot]
                        right = right.transpose((1, 0)) if transposed else right
                        plgpu.wgmma(accumulator, x_ring.at[slot, own], right)
                        # The step before is done, and this one keeps the tensor cores busy meanwhile.
                        plgpu.wgmma_wait(1)

                        @pl.when(step > 0)
                        def _free() -> None:
                            plgpu.barrier_arrive(empty.at[lax.rem(before + step - 1, tiles.stages)])

                    plgpu.barrier_wait(last_full)
                    if not masked:
                        plgpu.wgmma(accumulator, h_block.at[own], b_block)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(before + steps - 1, tiles.stages)])
                    return accumulator[...]

                total = pl.run_scoped(
                    accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiles.columns), jnp.float32)
                )
                rows = pl.ds(first_row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                row_key: Any = load_vector(row_block.at[own]) if masked else None
                for number in range(tiles.columns // tiles.chunk):
                    start = number * tiles.chunk
                    chunk = pl.ds(start, tiles.chunk)
                    part = total[:, start : start + tiles.chunk]
                    if masked:

                        def low_rank(accumulator: Any, chunk: Any = chunk) -> Array:
                            plgpu.wgmma(accumulator, h_block.at[own], b_block.at[:, chunk])
                            return accumulator[...]

                        term = pl.run_scoped(
                            low_rank, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiles.chunk), jnp.float32)
                        )
                        keep = keep_block(row_key, load_vector(key_block.at[chunk]), threshold)
                        part = part + jnp.where(keep, term, 0.0)
                    if bias is not None:
                        part = part + lax.broadcast_in_dim(load_vector(bias_block.at[chunk]), part.shape, [1])
                    columns = pl.ds(first_column + start, tiles.chunk)
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    out[warpgroup, number % 2] = part.astype(out.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out.at[warpgroup, number % 2], y_ref.at[group, rows, columns])
                plgpu.barrier_arrive(last_empty)

            plgpu.wait_smem_to_gmem(0)

    stages, columns, chunk = tiles.stages, tiles.columns, tiles.chunk
    # wgmma wants the same swizzle of h and of b, and a chunk must not cut an atom of b.
    low_rank_minor = math.gcd(rank, chunk)
    w_block = (columns, DEPTH) if transposed else (DEPTH, columns)
    scratch: dict[str, Any] = {
        "x_ring": plgpu.SMEM((stages, tiles.rows, DEPTH), x.dtype, transforms=swizzled(DEPTH, x.dtype)),
        "w_ring": plgpu.SMEM((stages, *w_block), x.dtype, transforms=swizzled(DEPTH, x.dtype)),
        "h_block": plgpu.SMEM((tiles.rows, rank), x.dtype, transforms=swizzled(low_rank_minor, x.dtype)),
        "b_block": plgpu.SMEM((rank, columns), x.dtype, transforms=swizzled(low_rank_minor, x.dtype)),
        "bias_block": None if bias is None else plgpu.SMEM((columns,), jnp.float32),
        "row_block": plgpu.SMEM((tiles.rows,), jnp.uint32) if masked else None,
        "key_block": plgpu.SMEM((columns,), jnp.uint32) if masked else None,
        "out": plgpu.SMEM((CONSUMERS, 2, WARPGROUP_ROWS, chunk), x.dtype, transforms=swizzled(chunk, x.dtype)),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        "last_full": plgpu.Barrier(num_arrivals=2 + (bias is not None) + 2 * masked),
        "last_empty": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    return plgpu.kernel(
        body,
        out_type=result((groups, m, n), x.dtype, x),
        scratch_types=scratch,
        grid=(multiprocessors,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="low_rank_frozen_matmul",
        compiler_params=COMPILER_PARAMS,
    )(x, w, h, b, bias, keys)
