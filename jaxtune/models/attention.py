"""Grouped-query attention over packed rows: causal, within a segment, within a window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Far below any score, and finite: adding it to a score gives itself exactly, and no difference of two is NaN.
MASKED = -1e30


def attention_bias(
    query_segments: Int32[Array, "b s"],
    key_segments: Int32[Array, "b t"],
    query_slots: Int32[Array, " s"],
    window: int | None,
) -> Float[Array, "b s t"]:
    """What is added to the scores: 0 where a query sees a key, :data:`MASKED` where it does not, float32.

    A query sees the keys of its own segment at its own slot and before. Padding (segment 0) is a segment like any
    other: every query sees at least itself, so no row of scores is empty and none can become NaN.

    An additive bias rather than a selection, because addition keeps nothing for the backward pass: a selection would
    keep its mask for each head of each layer.

    Args:
        query_segments: Segment of each query.
        key_segments: Segment of each key.
        query_slots: Index among the keys at which each query stands.
        window: Number of last slots that a query sees, its own included; None sees all.
    """
    slots = jnp.arange(key_segments.shape[1], dtype=jnp.int32)
    distance = query_slots[:, None] - slots[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    seen = near[None] & (query_segments[:, :, None] == key_segments[:, None, :])
    return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)


def attend(
    q: Float[Array, "b kv g s d"],
    k: Float[Array, "b kv t d"],
    v: Float[Array, "b kv t d"],
    bias: Float[Array, "#b s t"],
    soft_cap: float | None = None,
) -> Float[Array, "b kv g s d"]:
    """``softmax(cap(q · k) + bias) v``; scores and softmax in float32, the result in q's dtype.

    Keys and values are not repeated for the ``g`` query heads that share them. Heads come before slots, so that both
    products are plain batched matmuls: about twice as fast on CPU as leaving the layout to the compiler.

    Args:
        q: Queries, scaled already.
        k: Keys.
        v: Values.
        bias: From :func:`attention_bias`; one row may stand for all.
        soft_cap: Scores become ``soft_cap * tanh(scores / soft_cap)`` before the bias is added.
    """
    scores = jnp.einsum("bkgsd,bktd->bkgst", q, k, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(scores + bias[:, None, None], axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,bktd->bkgsd", weights, v)
