"""The low-rank matmul for every platform, left to XLA to fuse.

The derivative is written by hand, for three reasons. Plain differentiation would keep the dropped-out copy of x for
each adapter, where the mask is cheap to draw again. It would run the backward matmuls of a bfloat16 layer in float32.
And it would keep the M × N low-rank product for the gradient of the scale, which needs only M × r numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt32

from jaxtune_kernels.dropout import keep_mask
from jaxtune_kernels.quantized import Matrix, Quantized, matrix

LOW_RANK_STATES = "low_rank_states"
"""Name, for remat policies, of the M × r product x A: kept beside y, it leaves nothing of the forward pass to redo."""

Dropout = tuple[Float[Array, ""], UInt32[Array, ""], UInt32[Array, "*rows"]]


class Residuals(NamedTuple):
    """What the forward pass keeps: its inputs, which are alive anyway, and the M × r product x A."""

    x: Float[Array, "*rows k"]
    kernel: Matrix
    a: Float[Array, "k r"]
    b: Float[Array, "r n"]
    scale: Float[Array, ""]
    bias: Float[Array, " n"] | None
    dropout: Dropout | None
    h: Float[Array, "*rows r"]


def _dot(left: Array, right: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """Contracts the given axes; operands keep their dtype, the sum is float32."""
    return lax.dot_general(left, right, (axes, ((), ())), preferred_element_type=jnp.float32)


def _times(x: Array, matrix: Array) -> Array:
    """``x · matrix``, in float32."""
    return _dot(x, matrix, ((x.ndim - 1,), (0,)))


def _times_transposed(x: Array, matrix: Array) -> Array:
    """``x · matrixᵀ``, in float32, without a transposed copy."""
    return _dot(x, matrix, ((x.ndim - 1,), (1,)))


def _outer(left: Array, right: Array) -> Array:
    """``leftᵀ · right``, summed over all rows, in float32."""
    leading = tuple(range(left.ndim - 1))
    return _dot(left, right, (leading, leading))


def _dropped(x: Array, dropout: Dropout | None) -> tuple[Array, Array | float]:
    """x with zeros where it was dropped, and the factor 1 / (1 - rate), which is applied after the sum, in float32."""
    if dropout is None:
        return x, 1.0
    rate, seed, rows = dropout
    return jnp.where(keep_mask(seed, rows, x.shape[-1], rate), x, 0), 1.0 / (1.0 - rate)


@jax.custom_vjp
def low_rank_matmul_xla(
    x: Float[Array, "*rows k"],
    kernel: Matrix,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""],
    bias: Float[Array, " n"] | None,
    dropout: Dropout | None,
) -> Float[Array, "*rows n"]:
    """``y = x W + scale · (dropout(x) A) B + bias``; see :func:`jaxtune_kernels.low_rank_matmul`."""
    return _forward(x, kernel, a, b, scale, bias, dropout)[0]


def _forward(
    x: Float[Array, "*rows k"],
    kernel: Matrix,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""],
    bias: Float[Array, " n"] | None,
    dropout: Dropout | None,
) -> tuple[Float[Array, "*rows n"], Residuals]:
    z, boost = _dropped(x, dropout)
    h = _times(z, a.astype(x.dtype)) * boost
    y = _times(x, matrix(kernel, x.dtype)) + _times((scale * h).astype(x.dtype), b.astype(x.dtype))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    h = checkpoint_name(h.astype(x.dtype), LOW_RANK_STATES)
    return y.astype(x.dtype), Residuals(x, kernel, a, b, scale, bias, dropout, h)


def parameter_gradients(
    residuals: Residuals, g: Float[Array, "*rows n"], t: Float[Array, "*rows r"]
) -> tuple[Array | None, ...]:
    """The gradients of W, A, B, the scale and the bias, for the gradient ``g`` of y and ``t = g Bᵀ``.

    Products with a side of length r, which read x and g once more: M (K + N) entries. W's is a full matmul, exact for
    whoever trains W as well, and dead code, which XLA removes, for whoever holds it frozen; a quantized W has none.
    """
    x, kernel, a, b, scale, bias, dropout, h = residuals
    z, boost = _dropped(x, dropout)
    dkernel = None if isinstance(kernel, Quantized) else _outer(x, g).astype(kernel.dtype)
    # This way round XLA need not copy x transposed.
    da = _outer((scale * boost * t.astype(jnp.float32)).astype(x.dtype), z).T
    db = _outer((scale * h.astype(jnp.float32)).astype(x.dtype), g)
    dscale = jnp.sum(h.astype(jnp.float32) * t.astype(jnp.float32))
    dbias = None if bias is None else jnp.sum(g, axis=tuple(range(g.ndim - 1)), dtype=jnp.float32).astype(bias.dtype)
    return dkernel, da.astype(a.dtype), db.astype(b.dtype), dscale, dbias


def _backward(residuals: Residuals, g: Float[Array, "*rows n"]) -> tuple[Array | None, ...]:
    # Inside a scan, jax hands constants back as NumPy arrays.
    residuals = jax.tree.map(jnp.asarray, residuals)
    x, kernel, a, b, scale, _, dropout, _ = residuals
    t = _times_transposed(g, b.astype(x.dtype))
    boost = 1.0 if dropout is None else 1.0 / (1.0 - dropout[0])
    through_a = _times_transposed((scale * boost * t).astype(x.dtype), a.astype(x.dtype))
    if dropout is not None:
        # Forward, the mask sits on an input; here it sits on the output, after the matmul.
        rate, seed, rows = dropout
        through_a = jnp.where(keep_mask(seed, rows, x.shape[-1], rate), through_a, 0)
    dx = _times_transposed(g, matrix(kernel, x.dtype)) + through_a
    return dx.astype(x.dtype), *parameter_gradients(residuals, g, t), None


low_rank_matmul_xla.defvjp(_forward, _backward)
