"""The interface between the step and an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxtune.models import Head

Batch = Mapping[str, Any]
"""Arrays of ``[b, s]`` by name: ``tokens``, ``targets``, ``positions``, ``segment_ids`` and ``example_ids`` int32,
``weights`` float32."""

Hyperparameters = Mapping[str, Any]
"""Traced float32 scalars by dotted configuration key."""


@runtime_checkable
class Forward(Protocol):
    """The model with its adapters and dropout bound: what an objective calls.

    Logits of a whole batch are the largest array of a step by far. An objective that needs no more of them than the
    cross-entropy of targets asks for the hidden states, and the head for losses.
    """

    def __call__(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"] | None = None,
        segment_ids: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s vocab"]:
        """Logits of the next token."""
        ...

    def hidden(
        self,
        tokens: Int[Array, "b s"],
        positions: Int[Array, "b s"] | None = None,
        segment_ids: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """States after the final norm, in the compute dtype."""
        ...

    @property
    def head(self) -> Head:
        """What makes logits, or losses, of these states."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Losses and weights of one shape, float32."""

    def __call__(
        self, model: Forward, batch: Batch, hyperparameters: Hyperparameters
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Losses and their weights."""
        ...
