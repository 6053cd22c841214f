"""Drawing the next token: temperature, top-k and nucleus sampling with traced settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key


class Sampling(NamedTuple):
    """Settings of sampling, as scalars that a program takes as arguments.

    Attributes:
      temperature: float32 above 0; logits are divided by it.
      top_k: int32; only this many likeliest tokens are kept, 0 keeps all.
      top_p: float32 in (0, 1]; the fewest likeliest tokens that reach this probability are kept (arXiv:1904.09751).
      seed: uint32 that names the draws.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any


def filtered(
    logits: Float[Array, "b vocab"], sampling: Sampling
) -> tuple[Float[Array, "b vocab"], Int32[Array, "b vocab"]]:
    """Logits to draw from, likeliest first, and the token of each; what is not kept has -inf.

    Temperature, then top-k, then top-p on what top-k left, renormalised: the order of ``transformers``.
    """
    scaled = logits / sampling.temperature
    order = jnp.argsort(scaled, axis=-1, descending=True).astype(jnp.int32)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    ranks = jnp.arange(logits.shape[-1])
    ranked = jnp.where((sampling.top_k <= 0) | (ranks < sampling.top_k), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The likeliest token stays even where rounding would drop it.
    return jnp.where((before < sampling.top_p) | (ranks == 0), ranked, -jnp.inf), order


def sample(logits: Float[Array, "b vocab"], sampling: Sampling, keys: Key[Array, " b"]) -> Int32[Array, " b"]:
    """One token for each row, drawn with the row's own key."""
    ranked, order = filtered(logits, sampling)
    ranks = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, ranks[:, None], axis=-1)[:, 0]
