"""The decoder with adapters, dropout and remat policy bound: what the step hands to an objective."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from jaxtune.models import Adapters, Decoder, Head

Integers = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """A :class:`~jaxtune.training.objectives.Forward`.

    Attributes:
      decoder: with the parameters of this step in place.
      adapters: by module path.
      rows: identity of each position, for dropout; None where nothing is dropped.
      remat: what the backward pass recomputes.
      kernels: what computes products with adapters.
    """

    decoder: Decoder
    adapters: Adapters
    rows: UInt32[Integers, "b s"] | None
    remat: str
    kernels: str

    def __call__(
        self,
        tokens: Int32[Integers, "b s"],
        positions: Int32[Integers, "b s"] | None = None,
        segment_ids: Int32[Integers, "b s"] | None = None,
    ) -> Float[Array, "b s vocab"]:
        """Logits of the next token, float32."""
        return self.head.logits(self.hidden(tokens, positions, segment_ids))

    def hidden(
        self,
        tokens: Int32[Integers, "b s"],
        positions: Int32[Integers, "b s"] | None = None,
        segment_ids: Int32[Integers, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """States after the final norm, in the compute dtype."""
        return self.decoder.hidden(
            tokens,
            positions,
            segment_ids,
            adapters=self.adapters,
            rows=self.rows,
            remat=self.remat,
            kernels=self.kernels,
        )

    @property
    def head(self) -> Head:
        """What makes logits, or losses, of these states."""
        return self.decoder.head(adapters=self.adapters, rows=self.rows)
