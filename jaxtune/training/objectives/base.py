"""The interface between the step and an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxtune.evaluation.terms import Terms
from jaxtune.models import Head

Batch = Mapping[str, Any]
"""Arrays by name, rows first: ``tokens``, ``targets``, ``positions``, ``segment_ids`` and ``example_ids`` int32 and
``weights`` float32, all ``[b, s]``, and whatever else an objective of one's own reads."""

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

    @property
    def reference(self) -> Forward:
        """The model as the run began, without dropout, adapters or gradient: the same base, no copy of it."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Any function from a model and a batch to :class:`~jaxtune.evaluation.terms.Terms`."""

    def __call__(self, model: Forward, batch: Batch, hyperparameters: Hyperparameters) -> Terms:
        """Losses, their weights, and metrics."""
        ...
