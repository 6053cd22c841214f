"""The definition of the low-rank matmul, in float32: what every other implementation is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxtune_kernels.dropout import keep_mask
from jaxtune_kernels.quantized import Matrix, matrix


def low_rank_matmul_reference(
    x: Float[Array, "*rows k"],
    kernel: Matrix,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""],
    bias: Float[Array, " n"] | None,
    dropout: tuple[Float[Array, ""], UInt32[Array, ""], UInt32[Array, "*rows"]] | None,
) -> Float[Array, "*rows n"]:
    """``y = x W + scale · (dropout(x) A) B + bias`` (LoRA, arXiv:2106.09685, equation 3)."""
    with jax.default_matmul_precision("highest"):
        x32, a32, b32 = (array.astype(jnp.float32) for array in (x, a, b))
        z = x32
        if dropout is not None:
            rate, seed, rows = dropout
            z = jnp.where(keep_mask(seed, rows, x.shape[-1], rate), x32 / (1.0 - rate), 0.0)
        y = x32 @ matrix(kernel, jnp.float32) + scale * ((z @ a32) @ b32)
        if bias is not None:
            y = y + bias.astype(jnp.float32)
        return y.astype(x.dtype)
