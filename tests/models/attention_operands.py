"""Operands for comparing implementations of attention; as a program, the comparison on a TPU, which must be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.attention import attend
from jaxtune.models.splash import splash_attend


def operands(batch: int, kv: int, groups: int, length: int, head_dim: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Queries, keys and values; segments; a cotangent. Documents of uneven lengths end inside blocks, then padding."""
    generator = np.random.default_rng(seed)
    shapes = (batch, kv, groups, length, head_dim), *[(batch, kv, length, head_dim)] * 2
    q, k, v = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)
    segments = np.zeros((batch, length), np.int32)
    for row in range(batch):
        ends = np.sort(generator.integers(1, length, 4))
        for document, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            segments[row, start:end] = document + 1
    cotangent = jnp.asarray(generator.standard_normal(shapes[0]), jnp.float32)
    return (q * head_dim**-0.5, k, v), jnp.asarray(segments), cotangent


def values_and_gradients(function: Callable[..., Any], qkv: Any, cotangent: Any) -> tuple[Any, ...]:
    """The result, and the gradients with respect to queries, keys and values."""
    out, pullback = jax.vjp(function, *qkv)
    return out, *pullback(cotangent)


def check_equal(window: int | None, tolerance: float, interpret: bool) -> None:
    """The TPU's attention against our own, forward and backward."""
    qkv, segments, cotangent = operands(2, 2, 2, 256, 64)
    ours = values_and_gradients(lambda q, k, v: attend(q, k, v, segments, segments, None, window), qkv, cotangent)
    theirs = values_and_gradients(
        lambda q, k, v: splash_attend(q, k, v, segments, window, interpret=interpret), qkv, cotangent
    )
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def check_isolated(window: int | None, interpret: bool) -> None:
    """No gradient at all of a query's result with respect to what it must not see, and some for all that it sees."""
    (q, k, v), segments, _ = operands(1, 1, 1, 256, 64, seed=3)

    def total(q: Any, k: Any, v: Any, query: Any) -> Any:
        return jnp.sum(splash_attend(q, k, v, segments, window, interpret=interpret)[0, 0, 0, query])

    gradient = jax.jit(jax.grad(total, argnums=(1, 2)))
    ids, slots = np.asarray(segments)[0], np.arange(256)
    for query in (0, 60, 127, 128, 200, 255):
        seen = (slots <= query) & (ids == ids[query]) & (slots > query - (window or 256))
        dk, dv = (np.asarray(each)[0, 0] for each in gradient(q, k, v, query))
        assert not np.any(dk[~seen])
        assert not np.any(dv[~seen])
        assert np.all(np.any(dv[seen] != 0, axis=1))


def main() -> None:
    """The comparison on the hardware, where matmuls of float32 round their operands to bfloat16."""
    assert jax.default_backend() == "tpu", jax.default_backend()
    for window in (None, 5, 150):
        check_equal(window, tolerance=3e-2, interpret=False)
        check_isolated(window, interpret=False)
    print("splash attention equals our own on", jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
