"""Attention by jax's splash kernel, on TPUs: the same function as :func:`jaxtune.models.attention.attend`.

Which attention a platform gets:

- TPU: this one, for what it can do (:func:`splash_applies`). Documents are told apart inside the kernel, by segment
  ids, and windows are part of its static mask: both are tested in interpret mode against our own attention, and the
  kernel is compiled for TPUs inside the scanned decoder. Blocks of keys that no query can see are never computed.
  It can be differentiated once: derivatives of a whole training step need another platform.
- CPU, cached decoding, soft caps: our own.
- GPU: our own. cuDNN's attention, which ``jax.nn.dot_product_attention`` can select, sees no segment ids. It could be
  given a mask of s × s for each row, or the offsets of packed segments, but neither can be run without the hardware,
  so that nothing would prove that documents do not see each other: it is not selected.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxtune.models.attention import RESIDUALS
from jaxtune.parallel.platform import platform
from jaxtune.parallel.sharding import partition_spec

# The kernel's blocks are multiples of the 128 lanes of a vector register; larger ones than this fill the memory of a
# core in the backward pass.
_LANES = 128
_LARGEST_BLOCK = 512


def splash_applies(length: int, head_dim: int, soft_cap: float | None, cached: bool, mesh: Mesh | None) -> bool:
    """Whether :func:`splash_attend` computes this call: a TPU, whole blocks, no soft cap and no cache.

    Args:
        length: Tokens of a row.
        head_dim: Width of a head.
        soft_cap: Of the scores.
        cached: Whether keys of earlier calls are attended to.
        mesh: What the arrays lie on; None for the default device.
    """
    return platform(mesh) == "tpu" and soft_cap is None and not cached and length % _LANES == 0 and head_dim % 64 == 0


@functools.lru_cache(maxsize=32)
def _kernel(heads: int, length: int, window: int | None, interpret: bool) -> Any:
    # Imported here: it takes a while, and no other platform needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = _LARGEST_BLOCK
    while length % block:
        block //= 2
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # Else the arrays that describe the mask would belong to the trace that happens to come first.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )


def splash_attend(
    q: Float[Array, "b kv g s d"],
    k: Float[Array, "b kv s d"],
    v: Float[Array, "b kv s d"],
    segments: Int32[Array, "#b s"],
    window: int | None = None,
    mesh: Mesh | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b kv g s d"]:
    """``softmax(q · k + bias) v``, causal, within a segment and a window; the result has q's dtype.

    Args:
        q: Queries, scaled already.
        k: Keys.
        v: Values.
        segments: Segment of each token, padding's (0) like any other; one row may stand for all.
        window: Number of last tokens that a query sees, its own included; None sees all. Static.
        mesh: What the arrays lie on: rows and heads stay on their devices.
        interpret: Run the kernel in pure jax, on any platform: for tests.
    """

    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        _, kv_heads, groups, length, head_dim = q.shape
        kernel = _kernel(kv_heads * groups, length, window, interpret)

        def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return kernel(q.reshape(kv_heads * groups, length, head_dim), k, v, SegmentIds(segments, segments))

        return jax.vmap(row)(q, k, v, segments).reshape(q.shape).astype(q.dtype)

    segments = jnp.broadcast_to(segments, (q.shape[0], segments.shape[1]))
    if mesh is None or mesh.size == 1:
        return local(q, k, v, segments)
    by_head = partition_spec(("batch", "kv_heads", None, None), k.shape, mesh)
    queries = PartitionSpec(by_head[0], by_head[1], None, None, None)
    specs = queries, by_head, by_head, PartitionSpec(by_head[0], None)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, segments)
