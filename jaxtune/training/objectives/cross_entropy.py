"""Next-token cross-entropy: the objective of supervised fine-tuning."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxtune.training.objectives.base import Batch, Forward, Hyperparameters


def cross_entropy(
    model: Forward, batch: Batch, hyperparameters: Hyperparameters
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
    """Cross-entropy of every target token that has a weight, with label smoothing and z-loss.

    ``loss = (1 − ε) · nll + ε · mean over the vocabulary of −log p + z · log² Z`` (label smoothing: arXiv:1512.00567,
    section 7; z-loss: arXiv:2204.02311, section 5), with ε = ``train.label_smoothing`` and z = ``train.z_loss``.

    Returns:
      Losses, 0 where the weight is 0, and weights, float32 ``[b, s]``.
    """
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
    losses = model.head.losses(
        hidden,
        batch["targets"],
        batch["weights"],
        label_smoothing=hyperparameters["train.label_smoothing"],
        z_loss=hyperparameters["train.z_loss"],
    )
    return losses, batch["weights"]
