"""Floating-point operations of a training step, counted for what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxtune.models import DecoderConfig
from jaxtune.models.declarations import declare


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step; a multiply and an add count as two.

    Attributes:
      forward: of the forward pass.
      backward: of the backward pass: gradients of activations, and of the weights that are trained.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of the whole step; what rematerialisation computes again is not counted (model FLOPs, as for MFU)."""
        return self.forward + self.backward


def step_flops(
    config: DecoderConfig,
    *,
    tokens: int,
    sequence_length: int,
    added: Mapping[str, float] | None = None,
    full: Mapping[str, float] | None = None,
) -> StepFlops:
    """Counts one training step over rows of ``sequence_length``.

    A frozen matrix costs ``2·in·out`` per token forward and as much again for the gradient of its input; a trained one
    the same once more for its own gradient. What adapters add costs three times what it costs forward. Attention
    multiplies queries with keys and scores with values over half of the square, because it is causal, or over the
    window where that is smaller; backward costs twice that (two products for each one forward).

    Args:
      config: the model.
      tokens: positions in the batch, padding included.
      sequence_length: positions of a row.
      added: FLOPs of one token forward that an adapter adds to each module (``"layers.attention.q"``), of all layers; a
        low-rank term of rank r adds ``2·r·(in + out)`` in each.
      full: share of the layers that are trained for each parameter path (``"layers.mlp.up.kernel"``).
    """
    added, full = added or {}, full or {}
    # A lookup in the embedding table costs nothing, but an adapter may add a product behind it.
    forward = added.get("embed", 0.0)
    backward = 2.0 * forward
    for path, spec in declare(config).items():
        if (path == "embed.table" and config.tie_embeddings) or path.endswith(".kernel"):
            matrix = spec.size
        else:
            continue
        forward += 2.0 * matrix
        backward += 2.0 * matrix * (1.0 + full.get(path, 0.0))
        if (term := added.get(path.removesuffix(".kernel"), 0.0)) > 0:
            forward += term
            backward += 2.0 * term
    pairs = sum(_visible_keys(sequence_length, window) for window in config.windows) / sequence_length
    attention = 2.0 * 2.0 * config.num_heads * config.head_dim * pairs
    return StepFlops(tokens * (forward + attention), tokens * (backward + 2.0 * attention))


def _visible_keys(length: int, window: int | None) -> float:
    """Query-key pairs of one causal row of ``length``, halved square or band."""
    if window is None or window >= length:
        return length * length / 2.0
    return window * (length - window) + window * window / 2.0
