"""Puts what was trained into the weights, for a model that needs no adapter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune.models.decoder import Decoder, merge, split
from jaxtune.models.linear import LowRankAdapter
from jaxtune.updates.low_rank import Hyperparameters
from jaxtune.updates.plan import ResolvedPlan, Trainable


def merge_adapters(
    model: Decoder, plan: ResolvedPlan, trainable: Trainable, hyperparameters: Hyperparameters
) -> Decoder:
    """A decoder whose kernels are ``W + scale · A B`` and which holds the parameters that were trained themselves.

    The sum is float32 and then rounded to the model's dtype: exact to rounding for a float32 model. With a bfloat16 one
    a small update may vanish in part, so load the base with ``dtype="float32"`` where that counts.

    Args:
      model: the base; not changed.
      plan: what was trained.
      trainable: the trained arrays.
      hyperparameters: those of the training; a rule's own value where a key is missing.

    Raises:
      UserError: a rank is above the capacity.
    """
    plan.check_ranks(hyperparameters)
    static, params = split(model)
    merged, adapters = plan.apply(params, trainable, hyperparameters)
    for path, adapter in adapters.items():
        kernel = merged[f"{path}.kernel"]
        # One module at a time: the product is as large as its kernels, in float32.
        merged[f"{path}.kernel"] = jax.jit(_merged, out_shardings=kernel.sharding)(kernel, adapter)
    return merge(static, merged)


def _merged(kernel: Float[Array, "*layers inputs outputs"], adapter: LowRankAdapter) -> Float[Array, "..."]:
    product = jnp.matmul(adapter.a, adapter.b, precision=jax.lax.Precision.HIGHEST)
    total = kernel.astype(jnp.float32) + adapter.scale[..., None, None] * product
    return total.astype(kernel.dtype)
