"""The definition of the linear cross-entropy, in float32 and with all logits: what the other one is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune_kernels.linear_cross_entropy.operands import Rows, Term


def linear_cross_entropy_reference(terms: tuple[Term, ...], rows: Rows) -> Float[Array, "*rows"]:
    """``log Z − (1 − ε) target − ε mean + z log² Z`` of the capped logits ``Σ states · matrix``; 0 at weight 0.

    Where the target is no class, it and its gradient are NaN.
    """
    counts = rows.weights != 0
    with jax.default_matmul_precision("highest"):
        logits = jnp.float32(0.0)
        for term in terms:
            matrix = term.matrix.T if term.transposed else term.matrix
            # Zeros in rows that do not count: what they hold must not reach a gradient either.
            states = jnp.where(counts[..., None], term.states.astype(jnp.float32), 0.0)
            logits = logits + states @ matrix.astype(jnp.float32)
        if rows.soft_cap is not None:
            cap = rows.soft_cap[..., None]
            logits = cap * jnp.tanh(logits / cap)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        no_class = counts & ((rows.targets < 0) | (rows.targets >= logits.shape[-1]))
        target = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1, mode="clip")[..., 0]
        target = target * jnp.where(no_class, jnp.nan, 1.0)  # a factor, so that gradients are NaN as well
        expected = (1.0 - rows.label_smoothing) * target + rows.label_smoothing * logits.mean(axis=-1)
        losses = log_total - expected + rows.z_loss * jnp.square(log_total)
        return jnp.where(counts, losses, 0.0)
