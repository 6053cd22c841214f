"""The decoder with adapters, dropout and remat policy bound: what the step hands to an objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from jaxtune.errors import UserError
from jaxtune.models import Adapters, Decoder, Head, Params
from jaxtune.models.decoder import Detached, EmbeddingNoise

Integers = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """A :class:`~jaxtune.training.objectives.Forward`.

    Attributes:
      detached: the decoder without its arrays.
      params: of this step, in place.
      adapters: by module path.
      rows: identity of each position, for dropout; None where nothing is dropped.
      remat: what the backward pass recomputes.
      kernels: what computes products with adapters.
      start: makes the model as the run began, where the objective asks for it; None for itself.
      noise: on the embeddings; None for none.
    """

    detached: Detached
    params: Params
    adapters: Adapters
    rows: UInt32[Integers, "b s"] | None
    remat: str
    kernels: str
    start: Callable[[], BoundModel] | None = None
    noise: EmbeddingNoise | None = None

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
        """States after the final norm, in the compute dtype.

        Raises:
          UserError: dropout, which is drawn for each token of the batch, has nothing to draw by.
        """
        if self.rows is not None and self.rows.shape != tokens.shape:
            raise UserError(
                f"the objective calls the model with tokens of the shape {tokens.shape}, but dropout is drawn for each "
                f"of batch['tokens'], {self.rows.shape}: call it with that shape, or set the dropout of all rules to 0 "
                "(and leave train.neftune_alpha out)"
            )
        return self.detached.hidden(
            self.params,
            tokens,
            positions,
            segment_ids,
            adapters=self.adapters,
            rows=self.rows,
            noise=self.noise,
            remat=self.remat,
            kernels=self.kernels,
        )

    @property
    def decoder(self) -> Decoder:
        """The decoder with the parameters of this step in place."""
        return self.detached.merged(self.params)

    @property
    def head(self) -> Head:
        """What makes logits, or losses, of these states."""
        return self.detached.head(self.params, adapters=self.adapters, rows=self.rows)

    @property
    def reference(self) -> BoundModel:
        """The model as the run began, without dropout or gradient."""
        return self if self.start is None else self.start()


@dataclasses.dataclass(frozen=True)
class Lost(BoundModel):
    """In place of the model as the run began, where the state has weights of the base, which are not what they were."""

    def hidden(
        self,
        tokens: Int32[Integers, "b s"],
        positions: Int32[Integers, "b s"] | None = None,
        segment_ids: Int32[Integers, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Nothing.

        Raises:
          UserError: always.
        """
        raise UserError(
            "objective: it asks for the model as the run began, and a method of update moves weights of the base "
            "itself; use another method, or another objective"
        )
