"""Evaluation loss: from losses of tokens to the mean, its standard error and the loss of every example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Num

from jaxtune.evaluation.statistics import ratio


@dataclasses.dataclass(frozen=True)
class LossResult:
    """The loss of a set of examples.

    Attributes:
      loss: sum of weighted token losses over sum of weights (nats per token).
      standard_error: of ``loss``, examples being the independent observations; None with fewer than two examples. With
        S_e and W_e an example's sums and G examples: SE^2 = G / (G - 1) * sum_e (S_e - loss * W_e)^2 / (sum_e W_e)^2.
      tokens: sum of weights.
      example_ids: ids in ascending order; the examples with a positive weight.
      example_sums: S_e, the weighted sum of each one's token losses.
      example_weights: W_e, the sum of each one's weights.
    """

    loss: float
    standard_error: float | None
    tokens: float
    example_ids: Int[np.ndarray, " n"]
    example_sums: Float[np.ndarray, " n"]
    example_weights: Float[np.ndarray, " n"]


class LossTotals:
    """Sums weighted token losses per example, over batches in any order and rows packed in any way."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._sums: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def add(
        self,
        weighted_losses: Num[np.ndarray, "b s"],
        weights: Num[np.ndarray, "b s"],
        example_ids: Int[np.ndarray, "b s"],
    ) -> None:
        """Adds one batch.

        Args:
          weighted_losses: weight times loss of each token.
          weights: weight of each token; 0 where it does not count.
          example_ids: the example that each token belongs to; negative on padding, which is left out.
        """
        counted = (example_ids >= 0) & (weights > 0)
        ids, position = np.unique(example_ids[counted], return_inverse=True)
        self._ids.append(ids)
        self._sums.append(np.bincount(position, weighted_losses[counted].astype(np.float64), minlength=len(ids)))
        self._weights.append(np.bincount(position, weights[counted].astype(np.float64), minlength=len(ids)))

    def result(self) -> LossResult:
        """The loss of everything added so far.

        Raises:
          ValueError: no token has a positive weight.
        """
        every = np.concatenate(self._ids) if self._ids else np.zeros(0, np.int64)
        if not len(every):
            raise ValueError("no token to evaluate: all weights are zero")
        ids, position = np.unique(every, return_inverse=True)
        sums = np.bincount(position, np.concatenate(self._sums))
        weights = np.bincount(position, np.concatenate(self._weights))
        loss, error = ratio(sums, weights)
        return LossResult(loss, error, float(weights.sum()), ids, sums, weights)


def evaluate_loss(
    losses: Callable[[Mapping[str, Any]], tuple[Any, Any]], batches: Iterable[Mapping[str, np.ndarray]]
) -> LossResult:
    """The loss over batches, each example counted once.

    Args:
      losses: batch -> losses and their weights, both ``[b, s]``, or ``[b]`` for one loss a row, as arrays that this
        process can read as a whole (in a run of several processes: replicated). Usually jitted; it is called for a
        batch before the one before it has been read, so that the device does not wait for the host.
      batches: host batches with ``example_ids``, ``[b, s]``.

    Raises:
      ValueError: no token has a positive weight.
    """
    totals = LossTotals()
    pending: tuple[tuple[Any, Any], np.ndarray] | None = None

    def collect(launched: tuple[Any, Any], ids: np.ndarray) -> None:
        values, weights = jax.device_get(launched)
        if values.ndim == 1:
            values, weights, ids = values[:, None], weights[:, None], ids[:, :1]
        totals.add(values * weights, weights, ids)

    for batch in batches:
        launched = losses(batch)
        if pending is not None:
            collect(*pending)
        pending = launched, batch["example_ids"]
    if pending is not None:
        collect(*pending)
    return totals.result()
