"""Next-token cross-entropy: the objective of supervised fine-tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune.training.objectives.base import Batch, Forward, Hyperparameters


def cross_entropy(
    model: Forward, batch: Batch, hyperparameters: Hyperparameters
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
    """Cross-entropy of every target token, with label smoothing and z-loss.

    ``loss = (1 − ε) · nll + ε · mean over the vocabulary of −log p + z · log² Z`` (label smoothing: arXiv:1512.00567,
    section 7; z-loss: arXiv:2204.02311, section 5), with ε = ``train.label_smoothing`` and z = ``train.z_loss``.

    Returns:
      Losses and weights, float32 ``[b, s]``.
    """
    logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    smoothing = hyperparameters["train.label_smoothing"]
    expected = (1.0 - smoothing) * target + smoothing * logits.mean(axis=-1)
    losses = log_normalizer - expected + hyperparameters["train.z_loss"] * jnp.square(log_normalizer)
    return losses, batch["weights"]
