"""Attention against loops in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.models.attention import attend, attention_bias

run = jax.jit(attend, static_argnums=(6, 7))


def sees(query: int, key: int, query_segment: int, key_segment: int, window: int | None) -> bool:
    return query_segment == key_segment and key <= query and (window is None or key > query - window)


def attention_reference(q, k, v, query_segments, key_segments, slots, window, cap):
    """One query at a time, only over the keys that it sees; no masks, no shared heads."""
    out = np.zeros(q.shape)
    for b, h, g, s in np.ndindex(q.shape[:4]):
        keys = [
            t
            for t in range(k.shape[2])
            if sees(
                slots[s], t, query_segments[b % len(query_segments), s], key_segments[b % len(key_segments), t], window
            )
        ]
        scores = np.array([q[b, h, g, s] @ k[b, h, t] for t in keys])
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, h, g, s] = (weights / weights.sum()) @ v[b, h, keys]
    return out


def inputs(seed: int, batch: int, kv: int, groups: int, length: int, keys: int, dim: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = (batch, kv, groups, length, dim), (batch, kv, keys, dim), (batch, kv, keys, dim)
    return [random.normal(size=shape) for shape in shapes]


def narrow(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32) for a in arrays]


@settings(max_examples=10, deadline=None)
@given(
    length=st.integers(1, 9),
    earlier=st.integers(0, 4),
    groups=st.integers(1, 3),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    cap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 1000),
)
def test_equals_loops(length: int, earlier: int, groups: int, window: int | None, cap: float | None, seed: int) -> None:
    keys = earlier + length
    q, k, v = inputs(seed, 2, 2, groups, length, keys, 4)
    key_segments = np.sort(np.random.default_rng(seed).integers(0, 3, (2, keys)), axis=1)
    segments, slots = key_segments[:, earlier:], np.arange(earlier, keys)
    ours = run(*narrow(q, k, v, segments, key_segments, slots), window, cap)
    expected = attention_reference(q, k, v, segments, key_segments, slots, window, cap)
    np.testing.assert_allclose(np.asarray(ours), expected, atol=2e-6)


# 300 slots make three blocks of queries, the last one ragged; the windows end before, at and past a block's edge.
@pytest.mark.parametrize("window", [None, 3, 128, 200])
def test_blocks_of_queries_leave_out_only_what_is_not_seen(window: int | None) -> None:
    length = 300
    arrays = narrow(*inputs(0, 2, 1, 2, length, length, 4))
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, length), 0, 4), axis=1)
    direction = jax.random.normal(jax.random.key(0), arrays[0].shape)

    def value(slots: jax.Array | None, *qkv: jax.Array) -> jax.Array:
        return jnp.sum(attend(*qkv, segments, segments, slots, window, 1.5) * direction)

    function = jax.jit(jax.value_and_grad(value, argnums=(1, 2, 3)))
    in_blocks, whole = function(None, *arrays), function(jnp.arange(length, dtype=jnp.int32), *arrays)
    for a, e in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, e, atol=5e-6, rtol=5e-6)
    products = str(jax.make_jaxpr(value)(None, *arrays))
    assert f"f32[2,1,2,{length},{length}]" not in products


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("slots", [None, jnp.arange(7, dtype=jnp.int32)])
def test_gradient_equals_differentiated_definition(slots: jax.Array | None, cap: float | None) -> None:
    q, k, v = narrow(*inputs(0, 2, 2, 3, 7, 7, 4))
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1]], jnp.int32)
    direction = jax.random.normal(jax.random.key(0), q.shape)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bkgsd,bktd->bkgst", q, k)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        scores = scores + attention_bias(segments, segments, jnp.arange(7, dtype=jnp.int32), 3)[:, None, None]
        return jnp.sum(jnp.einsum("bkgst,bktd->bkgsd", jax.nn.softmax(scores, -1), v) * direction)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, segments, segments, slots, 3, cap) * direction)

    with jax.default_matmul_precision("highest"):
        expected, actual = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (plain, ours))
    for a, e in zip(actual, expected, strict=True):
        assert float(jnp.max(jnp.abs(e))) > 0.1
        np.testing.assert_allclose(a, e, atol=2e-6)


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    length = 64
    arrays = narrow(*inputs(0, 1, 1, 2, length, length, 4))
    segments = jnp.ones((1, length), jnp.int32)
    kept = jax.eval_shape(lambda *qkv: jax.vjp(lambda *x: attend(*x, segments, segments, None, 8), *qkv)[1], *arrays)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) < length * length


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_gives_finite_values_and_gradients(dtype: jnp.dtype) -> None:
    arrays = [a.astype(dtype) for a in narrow(*inputs(0, 2, 1, 2, 6, 6, 4))]
    segments = jnp.array([[0] * 6, [0, 0, 1, 1, 0, 0]], jnp.int32)
    slots = jnp.arange(6, dtype=jnp.int32)

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(attend(*qkv, segments, segments, slots, 2, None).astype(jnp.float32) ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)
    assert np.isfinite(value)
    for gradient in gradients:
        assert gradient.dtype == dtype
        assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_other_documents_have_no_influence_at_all() -> None:
    q, k, v = narrow(*inputs(0, 1, 1, 1, 6, 6, 4))
    segments, slots = jnp.array([[1, 1, 1, 2, 2, 2]], jnp.int32), jnp.arange(6, dtype=jnp.int32)
    before = run(q, k, v, segments, segments, slots)
    changed = run(q, k.at[:, :, :3].add(7.0), v.at[:, :, :3].add(7.0), segments, segments, slots)
    np.testing.assert_array_equal(before[..., 3:, :], changed[..., 3:, :])
    assert not np.array_equal(before[..., :3, :], changed[..., :3, :])
