"""Next-token cross-entropy: the objective of supervised fine-tuning."""

from __future__ import annotations

import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.evaluation.terms import Terms
from jaxtune.training.objectives.base import Batch, Forward, Hyperparameters

_READ = ("tokens", "targets", "weights")


def cross_entropy(model: Forward, batch: Batch, hyperparameters: Hyperparameters) -> Terms:
    """Cross-entropy of every target token that has a weight, with label smoothing and z-loss.

    ``loss = (1 − ε) · nll + ε · mean over the vocabulary of −log p + z · log² Z`` (label smoothing: arXiv:1512.00567,
    section 7; z-loss: arXiv:2204.02311, section 5), with ε = ``train.label_smoothing`` and z = ``train.z_loss``.

    Args:
      model: what is trained.
      batch: ``tokens``, ``targets`` (the token that each position should predict) and ``weights``, and where they are
        given ``positions`` and ``segment_ids``; all ``[b, s]``.
      hyperparameters: ε and z.

    Returns:
      Losses, 0 where the weight is 0, and weights, float32 ``[b, s]``.

    Raises:
      UserError: one of the three is missing, shapes differ, or targets are no integers.
    """
    if missing := [name for name in _READ if name not in batch]:
        raise UserError(
            f"cross_entropy reads {', '.join(_READ)} of a batch (and positions and segment_ids, where they are given), "
            f"all of one shape [b, s]; missing: {', '.join(missing)}; the batch holds {', '.join(batch)}"
        )
    tokens, targets, weights = (batch[name] for name in _READ)
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != tokens.shape:
            raise UserError(
                f"batch[{name!r}] has the shape {array.shape}, but batch['tokens'] has {tokens.shape}: cross_entropy "
                "needs a target and a weight for each token"
            )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise UserError(f"batch['targets'] holds {targets.dtype}; cross_entropy needs token ids, which are integers")
    weights = weights.astype(jnp.float32)
    losses = model.head.losses(
        model.hidden(tokens, batch.get("positions"), batch.get("segment_ids")),
        targets,
        weights,
        label_smoothing=hyperparameters["train.label_smoothing"],
        z_loss=hyperparameters["train.z_loss"],
    )
    return Terms(losses, weights)
