"""``y = x W + scale · (dropout(x) A) B + bias``: the matmul of a frozen layer with a low-rank adapter."""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxtune_kernels.low_rank.reference import low_rank_matmul_reference
from jaxtune_kernels.low_rank.xla import low_rank_matmul_xla

Implementation = Literal["reference", "xla"]


def low_rank_matmul(
    x: Float[Array, "*rows k"],
    kernel: Float[Array, "k n"],
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""] | float,
    *,
    bias: Float[Array, " n"] | None = None,
    dropout_rate: Float[Array, ""] | float | None = None,
    dropout_seed: UInt32[Array, ""] | int | None = None,
    rows: UInt32[Array, "*rows"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows n"]:
    """The output of a linear layer with a low-rank adapter, ``x W + scale · (dropout(x) A) B + bias``.

    The sums are float32, the operands of the matmuls have x's dtype, and so has the result. Gradients with respect to
    x, a, b, scale, bias and kernel are exact; the kernel's costs nothing under ``jax.jit`` unless it is asked for.

    Args:
      x: the layer's input, in the compute dtype.
      kernel: the frozen weight W, (in, out).
      a: A, usually float32; a column of zeros takes that rank out of the result and out of b's gradient.
      b: B, usually float32.
      scale: the factor on the low-rank term: alpha / rank, or alpha / sqrt(rank).
      bias: added to the result.
      dropout_rate: the probability in [0, 1) with which an entry of x is dropped on its way into A; at 0, which may be
        traced, nothing is dropped. None does not draw a mask at all.
      dropout_seed: names the draw; needed with dropout_rate.
      rows: an identity for each row of x, which dropout is drawn from, so that it does not depend on how rows are
        batched or packed. By default a row's index in x.
      implementation: None picks the best for the platform; "reference" is the plain definition in float32, "xla" the
        portable one.

    Raises:
      ValueError: the implementation is unknown, or dropout_rate comes without dropout_seed.
    """
    choices = get_args(Implementation)
    if implementation is not None and implementation not in choices:
        raise ValueError(f"unknown implementation {implementation!r}; choose from {', '.join(choices)}")
    if dropout_rate is None:
        dropout = None
    elif dropout_seed is None:
        raise ValueError("dropout_rate needs a dropout_seed")
    else:
        if rows is None:
            rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(x.shape[:-1])
        dropout = (jnp.asarray(dropout_rate, jnp.float32), jnp.asarray(dropout_seed, jnp.uint32), rows)
    function = low_rank_matmul_reference if implementation == "reference" else low_rank_matmul_xla
    return function(x, kernel, a, b, jnp.asarray(scale, jnp.float32), bias, dropout)
