"""The first of the two Hopper kernels of the low-rank matmul: from m × k down to m × r."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxtune_kernels.low_rank.hopper import (
    COMPILER_PARAMS,
    CONSUMERS,
    DEPTH,
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

# 16 KiB of x each: enough on the way at once to cover the latency of memory on a multiprocessor's share of it.
_STAGES = 5


def down_projection(
    x: Float[Array, "g m k"], a: Float[Array, "g r k"], keys: MaskKeys | None, boost: Float[Array, " g"] | None
) -> Float[Array, "g m r"]:
    """``h = mask(x) aᵀ · boost`` in x's dtype, summed in float32.

    A block has 64 rows and all of k, of which each consumer takes half, so x is read once. Without dropout that is what
    it costs: 2 m k bytes. With it an entry takes about eleven integer operations, of which a multiprocessor does 64 in
    a cycle: counted, not measured, as long as the reading, which goes on meanwhile. The mask is applied in registers,
    on the way from shared memory to the tensor cores; a masked x is never written.

    Args:
      x: m a multiple of 8 and k of 64.
      a: r a multiple of 16 and at most 128.
      keys: of masks over k columns; None for no mask.
      boost: 1 / (1 - rate), where there is a mask.
    """
    groups, m, k = x.shape
    rank = a.shape[1]
    steps = pl.cdiv(k, CONSUMERS * DEPTH)
    stage_bytes = CONSUMERS * DEPTH * (2 * (WARPGROUP_ROWS + rank) + 4)
    stages = min(_STAGES, steps, (SHARED_BYTES - 6 * WARPGROUP_ROWS * rank) // stage_bytes)
    masked = keys is not None

    def body(
        x_ref: Any, a_ref: Any, boost_ref: Any, keys_ref: Any, h_ref: Any,
        *, x_ring: Any, a_ring: Any, key_ring: Any, row_block: Any, sums: Any, out: Any,
        full: Any, empty: Any, rows_full: Any, summed: Any,
    ) -> None:  # fmt: skip
        warpgroup, group = lax.axis_index("warpgroup"), lax.axis_index("group")
        rows = pl.ds(lax.axis_index("rows") * WARPGROUP_ROWS, WARPGROUP_ROWS)

        @pl.when(warpgroup == CONSUMERS)
        def _produce() -> None:
            if masked:
                plgpu.copy_gmem_to_smem(keys_ref.rows.at[group, rows], row_block, rows_full)

            @pl.loop(0, steps)
            def _step(step: Array) -> None:
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(empty.at[slot])
                for half in range(CONSUMERS):
                    columns = pl.ds((CONSUMERS * step + half) * DEPTH, DEPTH)
                    plgpu.copy_gmem_to_smem(x_ref.at[group, rows, columns], x_ring.at[slot, half], full.at[slot])
                    plgpu.copy_gmem_to_smem(a_ref.at[group, :, columns], a_ring.at[slot, half], full.at[slot])
                    if masked:
                        plgpu.copy_gmem_to_smem(
                            keys_ref.columns.at[group, columns], key_ring.at[slot, half], full.at[slot]
                        )

            drain(empty, stages)

        @pl.when(warpgroup != CONSUMERS)
        def _consume() -> None:
            release_all(empty, stages)
            row_key: Any = None
            threshold: Any = None
            if masked:
                threshold = keys_ref.thresholds[group]
                plgpu.barrier_wait(rows_full)
                row_key = load_vector(row_block)

            def accumulate(accumulator: Any) -> Array:
                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    left = x_ring.at[slot, warpgroup]
                    if masked:
                        keep = keep_block(row_key, load_vector(key_ring.at[slot, warpgroup]), threshold)
                        left = jnp.where(keep, left[...], 0)
                    plgpu.wgmma(accumulator, left, a_ring.at[slot, warpgroup].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    if masked:
                        # The slot was read by plain loads, behind which only a fence puts the copy that fills it anew.
                        plgpu.commit_smem()
                    plgpu.barrier_arrive(empty.at[slot])

                return accumulator[...]

            part = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, rank), jnp.float32))

            @pl.when(warpgroup == 1)
            def _hand_over() -> None:
                sums[...] = part
                plgpu.barrier_arrive(summed)

            @pl.when(warpgroup == 0)
            def _store() -> None:
                plgpu.barrier_wait(summed)
                total = part + sums[...]
                if masked:
                    total = total * boost_ref[group]
                out[...] = total.astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, h_ref.at[group, rows])
                plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = {
        "x_ring": plgpu.SMEM((stages, CONSUMERS, WARPGROUP_ROWS, DEPTH), x.dtype, transforms=swizzled(DEPTH, x.dtype)),
        "a_ring": plgpu.SMEM((stages, CONSUMERS, rank, DEPTH), x.dtype, transforms=swizzled(DEPTH, x.dtype)),
        "key_ring": plgpu.SMEM((stages, CONSUMERS, DEPTH), jnp.uint32) if masked else None,
        "row_block": plgpu.SMEM((WARPGROUP_ROWS,), jnp.uint32) if masked else None,
        "sums": plgpu.SMEM((WARPGROUP_ROWS, rank), jnp.float32),
        "out": plgpu.SMEM((WARPGROUP_ROWS, rank), x.dtype),
        "full": plgpu.Barrier(num_arrivals=(2 + masked) * CONSUMERS, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        "rows_full": plgpu.Barrier() if masked else None,
        "summed": plgpu.Barrier(),
    }
    return plgpu.kernel(
        body,
        out_type=result((groups, m, rank), x.dtype, x),
        scratch_types=scratch,
        grid=(pl.cdiv(m, WARPGROUP_ROWS), groups),
        grid_names=("rows", "group"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="low_rank_down_projection",
        compiler_params=COMPILER_PARAMS,
    )(x, a, boost, keys)
