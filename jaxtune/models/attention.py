"""Grouped-query attention over packed rows: causal, within a segment, within a window."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

# Far below any score, and finite: adding it to a score gives itself exactly, and no difference of two is NaN.
MASKED = -1e30

HEADS = "attention_heads"
"""Name, for remat policies, of queries, keys and values as attention takes them: rotated, heads before slots."""

RESIDUALS = "attention_residuals"
"""Name, for remat policies, of what attention keeps for its backward pass beside its inputs."""

# Queries are cut into at most so many blocks, none smaller than this: each multiplies only the keys it can see, which
# leaves 5/8 of the square at four blocks. More of them save little and make many small matmuls.
_MOST_BLOCKS = 4
_SMALLEST_BLOCK = 128


def attention_bias(
    query_segments: Int32[Array, "b s"],
    key_segments: Int32[Array, "b t"],
    query_slots: Int32[Array, " s"],
    window: int | None,
) -> Float[Array, "b s t"]:
    """What is added to the scores: 0 where a query sees a key, :data:`MASKED` where it does not, float32.

    A query sees the keys of its own segment at its own slot and before. Padding (segment 0) is a segment like any
    other: every query sees at least itself, so no row of scores is empty and none can become NaN.

    Args:
        query_segments: Segment of each query.
        key_segments: Segment of each key.
        query_slots: Index among the keys at which each query stands.
        window: Number of last slots that a query sees, its own included; None sees all.
    """
    distance = query_slots[:, None] - jnp.arange(key_segments.shape[1], dtype=jnp.int32)[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    seen = near[None] & (query_segments[:, :, None] == key_segments[:, None, :])
    return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)


def _blocks(queries: int, keys: int, query_slots: Array | None, window: int | None) -> list[tuple[slice, slice]]:
    """Slices of queries, each with the slice of keys that it can see; a single pair where slots are not known."""
    if query_slots is not None:
        return [(slice(0, queries), slice(0, keys))]
    size = max(_SMALLEST_BLOCK, -(-queries // _MOST_BLOCKS))
    starts = range(0, queries, size)
    first_keys = [0 if window is None else max(0, start - window + 1) for start in starts]
    ends = [min(start + size, queries) for start in starts]
    return [(slice(start, end), slice(key, end)) for start, end, key in zip(starts, ends, first_keys, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
    q: Float[Array, "b kv g s d"],
    k: Float[Array, "b kv t d"],
    v: Float[Array, "b kv t d"],
    query_segments: Int32[Array, "#b s"],
    key_segments: Int32[Array, "#b t"],
    query_slots: Int32[Array, " s"] | None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "b kv g s d"]:
    """``softmax(cap(q · k) + bias) v``; scores and softmax in float32, the result in q's dtype.

    Keys and values are not repeated for the ``g`` query heads that share them. Heads come before slots, so that all
    products are plain batched matmuls: about twice as fast on CPU as leaving the layout to the compiler.

    The backward pass computes the scores again from q and k, as flash attention does (arXiv:2205.14135, algorithm 4).
    So no array of ``s · t`` scores is kept for any layer. This costs no time on CPU: the recomputation takes as long
    as writing and reading the scores.

    Args:
        q: Queries, scaled already.
        k: Keys.
        v: Values.
        query_segments: Segment of each query; one row may stand for all.
        key_segments: Segment of each key; one row may stand for all.
        query_slots: Index among the keys at which each query stands. None where query i stands at key i: then keys
            that no query of a block can see are left out of its products.
        window: Number of last slots that a query sees, its own included; None sees all. Static.
        soft_cap: Scores become ``soft_cap * tanh(scores / soft_cap)`` before the bias is added (Gemma 2). Static.
    """
    return _forward(q, k, v, query_segments, key_segments, query_slots, window, soft_cap)[0]


def _scores(q: Array, k: Array, soft_cap: float | None) -> Array:
    scores = jnp.einsum("bkgsd,bktd->bkgst", q, k, preferred_element_type=jnp.float32)
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _block_bias(
    segments: tuple[Array, Array], query_slots: Array | None, queries: slice, keys: slice, window: int | None
) -> Array:
    slots = jnp.arange(queries.start, queries.stop, dtype=jnp.int32) if query_slots is None else query_slots
    bias = attention_bias(segments[0][:, queries], segments[1][:, keys], slots - keys.start, window)
    return bias[:, None, None]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    query_segments: Array,
    key_segments: Array,
    query_slots: Array | None,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Array, tuple[Array | None, ...]]:
    outs, log_totals = [], []
    for queries, keys in _blocks(q.shape[3], k.shape[2], query_slots, window):
        bias = _block_bias((query_segments, key_segments), query_slots, queries, keys, window)
        scores = _scores(q[..., queries, :], k[:, :, keys], soft_cap) + bias
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        seen = v[:, :, keys]
        summed = jnp.einsum("bkgst,bktd->bkgsd", weights.astype(v.dtype), seen, preferred_element_type=jnp.float32)
        outs.append((summed / total).astype(q.dtype))
        log_totals.append(top + jnp.log(total))
    # Named, so that a remat policy can keep these two and need not run the forward pass again.
    out = checkpoint_name(jnp.concatenate(outs, axis=3), RESIDUALS)
    log_total = checkpoint_name(jnp.concatenate(log_totals, axis=3), RESIDUALS)
    return out, (q, k, v, query_segments, key_segments, query_slots, out, log_total)


def _backward(
    window: int | None, soft_cap: float | None, residuals: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    q, k, v, query_segments, key_segments, query_slots, out, log_total = residuals
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dqs = []
    # Transposed, as the two products below give them.
    dk, dv = (jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), jnp.float32) for x in (k, v))
    for queries, keys in _blocks(q.shape[3], k.shape[2], query_slots, window):
        bias = _block_bias((query_segments, key_segments), query_slots, queries, keys, window)
        q_block, g_block = q[..., queries, :], g[..., queries, :]
        scores = _scores(q_block, k[:, :, keys], soft_cap)
        weights = jnp.exp(scores + bias - log_total[..., queries, :])
        # Transposed results of these two: XLA would otherwise transpose its first operand, the scores, on CPU.
        dv_block = jnp.einsum("bkgsd,bkgst->bkdt", g_block, weights.astype(g.dtype), preferred_element_type=jnp.float32)
        dweights = jnp.einsum("bkgsd,bktd->bkgst", g_block, v[:, :, keys], preferred_element_type=jnp.float32)
        dscores = weights * (dweights - mean[..., queries, :])
        if soft_cap is not None:
            dscores = dscores * (1.0 - jnp.square(scores / soft_cap))
        dscores = dscores.astype(q.dtype)
        dqs.append(jnp.einsum("bkgst,bktd->bkgsd", dscores, k[:, :, keys], preferred_element_type=jnp.float32))
        dk_block = jnp.einsum("bkgsd,bkgst->bkdt", q_block, dscores, preferred_element_type=jnp.float32)
        dk, dv = dk.at[..., keys].add(dk_block), dv.at[..., keys].add(dv_block)
    dq = jnp.concatenate(dqs, axis=3)
    dk, dv = dk.swapaxes(2, 3), dv.swapaxes(2, 3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


attend.defvjp(_forward, _backward)
