"""The linear layer, with or without a low-rank adapter beside its frozen kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtune_kernels import keep_mask, low_rank_matmul
from jaxtyping import Array, Float, UInt32

KERNELS = ("auto", "xla", "pallas", "interpret")
"""What computes a product with an adapter: the best by platform and shape, XLA, the platform's Pallas kernel, or
that of TPUs in an interpreter (for tests: very slow)."""

PROJECTION = "projection"
"""Name, for remat policies, of a linear layer's result."""


@dataclasses.dataclass(frozen=True, init=False)
class LowRankAdapter:
    """A low-rank update of one module, ``scale · A B`` (LoRA, arXiv:2106.09685), or of one module in all layers.

    A pytree. In a stack every array, the scalars too, has the layer axis first and is scanned beside the weights.

    Attributes:
        a: A, float32; a rank that is masked out has a column of zeros here.
        b: B, float32.
        scale: Factor on the product: alpha / rank, or alpha / sqrt(rank).
        dropout_rate: Probability with which an entry of the input is dropped before A, or None for no dropout.
        dropout_seed: Names the draw, another one in each module and layer; None without dropout.
    """

    a: Float[Array, "*layers inputs rank"]
    b: Float[Array, "*layers rank outputs"]
    scale: Float[Array, "*layers"]
    dropout_rate: Float[Array, "*layers"] | None
    dropout_seed: UInt32[Array, "*layers"] | None

    # Leaves are not annotated: jax also builds this tree with shapes, shardings, axes or placeholders for leaves.
    def __init__(self, a: Any, b: Any, scale: Any, dropout_rate: Any = None, dropout_seed: Any = None) -> None:
        for name, value in (
            ("a", a),
            ("b", b),
            ("scale", scale),
            ("dropout_rate", dropout_rate),
            ("dropout_seed", dropout_seed),
        ):
            object.__setattr__(self, name, value)


jax.tree_util.register_dataclass(
    LowRankAdapter, data_fields=["a", "b", "scale", "dropout_rate", "dropout_seed"], meta_fields=[]
)


def linear(
    x: Float[Array, "*rows inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None = None,
    adapter: LowRankAdapter | None = None,
    rows: UInt32[Array, "*rows"] | None = None,
    *,
    kernels: str = "auto",
    axes: Mapping[Any, Sequence[str]] | None = None,
) -> Float[Array, "*rows outputs"]:
    """``x W + bias``, and ``+ scale · (dropout(x) A) B`` with an adapter; the result has x's dtype.

    Args:
        x: Input, in the compute dtype.
        kernel: W, (in, out).
        bias: Added to the result.
        adapter: The adapter of this module (of one layer, not of a stack).
        rows: An identity for each row of x, from which dropout is drawn; by default its index.
        kernels: One of :data:`KERNELS`, for the product with an adapter.
        axes: Mesh axes that ``rows``, ``inputs`` and ``outputs`` are cut over, for kernels that XLA does not partition.
    """
    kernel = kernel.astype(x.dtype)
    if adapter is not None:
        y = low_rank_matmul(
            x,
            kernel,
            adapter.a,
            adapter.b,
            adapter.scale,
            bias=bias,
            dropout_rate=adapter.dropout_rate,
            dropout_seed=adapter.dropout_seed,
            rows=rows,
            implementation=None if kernels == "auto" else kernels,
            axes=axes,
        )
        return checkpoint_name(y, PROJECTION)
    # No float32 result type for a bfloat16 matmul: every backend sums in float32 anyway, and asking for the result in
    # float32 would make the gradient's matmuls mix float32 with bfloat16.
    y = jnp.dot(x, kernel)
    return checkpoint_name(y if bias is None else y + bias.astype(y.dtype), PROJECTION)


@functools.partial(jax.checkpoint, prevent_cse=False)
def low_rank_states(
    x: Float[Array, "*rows inputs"], adapter: LowRankAdapter, rows: UInt32[Array, "*rows"] | None = None
) -> Float[Array, "*rows rank"]:
    """``scale · dropout(x) A``, which B multiplies, where the layer's own product is made elsewhere; has x's dtype.

    The backward pass draws the mask again, as it does in :func:`jaxtune_kernels.low_rank_matmul`, with the same bits.

    Args:
        x: Input, in the compute dtype.
        adapter: The adapter of one layer.
        rows: An identity for each row of x, from which dropout is drawn; by default its index.
    """
    factor = adapter.scale
    if adapter.dropout_rate is not None:
        assert adapter.dropout_seed is not None
        if rows is None:
            rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(x.shape[:-1])
        x = jnp.where(keep_mask(adapter.dropout_seed, rows, x.shape[-1], adapter.dropout_rate), x, 0)
        factor = factor / (1.0 - adapter.dropout_rate)
    product = jnp.dot(x, adapter.a.astype(x.dtype), preferred_element_type=jnp.float32)
    return (factor * product).astype(x.dtype)
