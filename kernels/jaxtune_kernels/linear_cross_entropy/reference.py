"""The definition of the linear cross-entropy, in float32 and with all logits: what the other one is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune_kernels.linear_cross_entropy.operands import Rows, Term


def linear_cross_entropy_reference(terms: tuple[Term, ...], rows: Rows) -> Float[Array, "*rows"]:
    """``log Z − (1 − ε) target − ε mean + z log² Z`` of the capped logits ``Σ states · matrix``; 0 at weight 0."""
    with jax.default_matmul_precision("highest"):
        logits = jnp.float32(0.0)
        for term in terms:
            matrix = term.matrix.T if term.transposed else term.matrix
            logits = logits + term.states.astype(jnp.float32) @ matrix.astype(jnp.float32)
        if rows.soft_cap is not None:
            cap = rows.soft_cap[..., None]
            logits = cap * jnp.tanh(logits / cap)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
        expected = (1.0 - rows.label_smoothing) * target + rows.label_smoothing * logits.mean(axis=-1)
        losses = log_total - expected + rows.z_loss * jnp.square(log_total)
        return jnp.where(rows.weights != 0, losses, 0.0)
