"""Evaluation loss: from losses of tokens to the mean, its standard error and the loss of every example."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Num

from jaxtune.evaluation.statistics import ratio
from jaxtune.evaluation.terms import Terms


@dataclasses.dataclass(frozen=True, repr=False)
class LossResult:
    """The loss of a set of examples.

    Attributes:
      loss: sum of weighted token losses over sum of weights (nats per token), or of the objective's denominators.
      standard_error: of ``loss``, examples being the independent observations; None with fewer than two examples. With
        S_e and W_e an example's sums and G examples: SE^2 = G / (G - 1) * sum_e (S_e - loss * W_e)^2 / (sum_e W_e)^2.
      tokens: sum of weights, or of the objective's denominators.
      example_ids: ids in ascending order; the examples with a positive weight.
      example_sums: S_e, the weighted sum of each one's token losses.
      example_weights: W_e, the sum of each one's weights, or denominators.
      metrics: the objective's own, each the weighted mean over all examples.
    """

    loss: float
    standard_error: float | None
    tokens: float
    example_ids: Int[np.ndarray, " n"]
    example_sums: Float[np.ndarray, " n"]
    example_weights: Float[np.ndarray, " n"]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        error = "" if self.standard_error is None else f", standard_error={self.standard_error:.4g}"
        further = "".join(f", {name}={value:.4g}" for name, value in self.metrics.items())
        examples = len(self.example_ids)
        return f"LossResult(loss={self.loss:.6g}{error}, tokens={self.tokens:g}, examples={examples}{further})"


_IDENTITIES = ("example_ids", "segment_ids")


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
          weights: what each token adds to the denominator; its weight, as a rule, and 0 where it does not count.
          example_ids: the example that each token belongs to; negative on padding, which is left out.
        """
        counted = (example_ids >= 0) & ((weights > 0) | (weighted_losses != 0))
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


def evaluate_loss(terms: Callable[[Mapping[str, Any]], Terms], batches: Iterable[Mapping[str, Any]]) -> LossResult:
    """The loss over batches, each example counted once.

    Args:
      terms: the objective over a batch, as arrays that this process can read as a whole (in a run of several processes:
        replicated). Losses are ``[b, s]``, or ``[b]`` for one loss a row; of another shape, each is an example of its
        own. Usually jitted; it is called for a batch before the one before it has been read, so that the device does
        not wait for the host.
      batches: host batches with ``example_ids``, ``[b, s]``. Without, every segment of a row (``segment_ids``, 0 is
        padding) is an example of its own, or else every row.

    Raises:
      ValueError: no token has a positive weight.
    """
    totals = LossTotals()
    metrics: dict[str, tuple[float, float]] = {}
    first = 0
    pending: tuple[Terms, Mapping[str, Any]] | None = None

    def collect(launched: Terms, batch: Mapping[str, Any]) -> None:
        nonlocal first
        read: Terms = jax.device_get(launched)
        losses = np.asarray(read.losses)
        ids = _example_ids(batch, losses.shape, first)
        first = max(first, int(ids.max(initial=-1)) + 1)
        weights = np.broadcast_to(read.weights, losses.shape)
        counted = weights if read.denominators is None else np.broadcast_to(read.denominators, losses.shape)
        # What stands where nothing counts may be anything, no number included.
        weighted = np.where(weights == 0, 0.0, losses * weights)
        totals.add(weighted.reshape(ids.shape), counted.reshape(ids.shape), ids)
        for name, (values, metric_weights) in read.metrics.items():
            values = np.asarray(values, np.float64)
            shares = np.broadcast_to(metric_weights, values.shape).astype(np.float64)
            total, weight = metrics.get(name, (0.0, 0.0))
            metrics[name] = total + float((values * shares).sum()), weight + float(shares.sum())

    for batch in batches:
        launched = terms(batch)
        if pending is not None:
            collect(*pending)
        pending = launched, batch
    if pending is not None:
        collect(*pending)
    means = {name: total / weight if weight else float("nan") for name, (total, weight) in metrics.items()}
    return dataclasses.replace(totals.result(), metrics=means)


def _example_ids(batch: Mapping[str, Any], shape: tuple[int, ...], first: int) -> Int[np.ndarray, "b s"]:
    """The example of each loss, losses that are no ``[b, s]`` as a column.

    Args:
      batch: as :func:`evaluate_loss` takes them.
      shape: of its losses.
      first: the least id that may be made up, so that none comes twice.
    """
    given, segments = (None if batch.get(name) is None else np.asarray(batch[name]) for name in _IDENTITIES)
    if given is not None and shape == given.shape:
        return given
    if given is not None and shape == given.shape[:1]:
        return given[:, :1]
    if segments is not None and shape == segments.shape:
        rows = first + np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1)
        return np.where(segments > 0, rows + segments, -1)
    if len(shape) == 2:
        return np.broadcast_to(first + np.arange(shape[0])[:, None], shape)
    return first + np.arange(math.prod(shape))[:, None]
