"""Ratios with honest error bars: the standard error and the paired bootstrap of an evaluation's score.

Every score here is a ratio of sums (weighted token losses over weights, values found over values present), or the mean
of such ratios over strata (attributes). The examples of one document are not independent, so the error bars take sums
over *clusters* as the independent observations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped


def indices(labels: Sequence[Hashable]) -> Int[np.ndarray, " n"]:
    """Numbers labels from 0 in the order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def ratio(
    numerators: Shaped[np.ndarray, " n"],
    denominators: Shaped[np.ndarray, " n"],
    *,
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float | None]:
    """The mean over strata of (sum of numerators / sum of denominators), and its standard error.

    The standard error is the linearised ("Taylor", "sandwich") one of a ratio estimator under cluster sampling
    (Cochran, Sampling Techniques, 1977, 6.3 and 9A.3). With R_s = Y_s / X_s the ratio of stratum s out of S, example i
    of stratum s has the influence z_i = (y_i - R_s x_i) / (S X_s), and over G clusters

        SE^2 = G / (G - 1) * sum_g (sum_{i in g} z_i)^2.

    For one stratum with x = 1 and one example per cluster this is the ordinary standard error of a mean.

    Args:
      numerators: y, one number per example.
      denominators: x, not negative. Strata with a zero sum are left out of the mean.
      strata: label per example; one stratum if None.
      clusters: label per example; every example is its own cluster if None.

    Returns:
      The estimate (nan where all denominators are zero), and the standard error (None with fewer than two clusters).
    """
    y, x = numerators.astype(np.float64), denominators.astype(np.float64)
    stratum = indices(strata) if strata is not None else np.zeros(len(y), np.int64)
    cluster = indices(clusters) if clusters is not None else np.arange(len(y))
    used = np.bincount(stratum, x) > 0
    if not used.any():
        return float("nan"), None
    totals = np.where(used, np.bincount(stratum, x), 1.0)
    ratios = np.bincount(stratum, y) / totals
    influence = np.where(used[stratum], (y - ratios[stratum] * x) / (used.sum() * totals[stratum]), 0.0)
    # Clusters without a denominator (padding, documents without any present value) are no observations.
    observed = np.bincount(cluster, x) > 0
    sums = np.bincount(cluster, influence)[observed]
    count = len(sums)
    error = float(np.sqrt(count / (count - 1) * np.sum(sums**2))) if count > 1 else None
    return float(ratios[used].mean()), error


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """How much better one system scored than another on the same examples.

    Attributes:
      difference: score of the first minus score of the second.
      low: lower end of the percentile interval.
      high: upper end of the percentile interval.
      confidence: coverage of the interval.
      samples: number of bootstrap samples.
    """

    difference: float
    low: float
    high: float
    confidence: float
    samples: int


def paired_bootstrap(
    first: Shaped[np.ndarray, " n"],
    second: Shaped[np.ndarray, " n"],
    denominators: Shaped[np.ndarray, " n"],
    *,
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Percentile bootstrap interval of the difference of two scores (Efron & Tibshirani 1993; Koehn 2004 for pairing).

    Clusters are drawn with replacement and both systems are scored on the same draw, so what makes an example hard for
    both cancels. The score is that of :func:`ratio`; a stratum that a draw left empty is left out of that draw's mean.

    Args:
      first: numerators of the first system, one per example (correct or not; summed loss).
      second: numerators of the second system, for the same examples in the same order.
      denominators: shared by both (1 or 0: does the example count; number of tokens).
      strata: label per example whose ratios are averaged; one stratum if None.
      clusters: label per example of what is drawn; every example by itself if None.
      samples: number of draws.
      confidence: coverage of the interval, in (0, 1).
      seed: of the draws.
    """
    stratum = indices(strata) if strata is not None else np.zeros(len(first), np.int64)
    cluster = indices(clusters) if clusters is not None else np.arange(len(first))
    shape = (int(cluster.max(initial=0)) + 1, int(stratum.max(initial=0)) + 1)

    def table(values: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, "clusters strata"]:
        sums = np.zeros(shape)
        np.add.at(sums, (cluster, stratum), values.astype(np.float64))
        return sums

    gain, count = table(first.astype(np.float64) - second.astype(np.float64)), table(denominators)

    def difference(draws: Float[np.ndarray, "samples clusters"]) -> Float[np.ndarray, " samples"]:
        totals, gains = draws @ count, draws @ gain
        filled = totals > 0
        ratios = np.where(filled, gains / np.where(filled, totals, 1.0), 0.0)
        return ratios.sum(1) / np.maximum(filled.sum(1), 1)

    generator = np.random.default_rng(seed)
    drawn = np.concatenate(
        [
            # In blocks, so that memory stays small for many clusters.
            difference(generator.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size=size).astype(np.float64))
            for size in [256] * (samples // 256) + [samples % 256] * (samples % 256 > 0)
        ]
    )
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    observed = difference(np.ones((1, shape[0])))[0]
    return PairedDifference(float(observed), float(low), float(high), confidence, samples)
