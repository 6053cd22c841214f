"""How well early scores agree with final ones, and how sure a difference on the test split is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

# Fewer pairs than this give a rank correlation no meaning.
_FEWEST_PAIRS = 3


def top_k_overlap(early: Sequence[float], final: Sequence[float], k: int) -> int:
    """How many of the ``k`` best by early score are among the ``k`` best by final score (lower is better).

    Ties are broken by position, the same way on both sides.
    """
    best = [set(np.argsort(np.asarray(scores), kind="stable")[:k].tolist()) for scores in (early, final)]
    return len(best[0] & best[1])


def rank_agreement(
    early: Sequence[float], final: Sequence[float | None], *, top_k: int, failed: Sequence[bool]
) -> dict[str, Any]:
    """How the order at the fraction agrees with the order at the end.

    Args:
      early: early score of each trial, lower is better; infinite where the trial diverged.
      final: final score of each trial, lower is better; None where the trial was not finished.
      top_k: size of the two leading groups that are compared.
      failed: whether each trial diverged; such a trial needs no final score and ranks last.

    Returns:
      ``spearman`` and ``kendall`` (tau-b) over finished trials, ``top_k``, ``top_k_overlap`` (trials in both leading
      groups; None unless *every* trial was finished or diverged and there are more than ``top_k``), ``finished`` (the
      number of pairs) and ``basis``: ``all`` where no trial is missing, ``survivors`` where only promoted trials have a
      final score, which makes a correlation look smaller than it is over all. What is not known is None.
    """
    pairs = [(a, b) for a, b, bad in zip(early, final, failed, strict=True) if b is not None and not bad]
    spearman = kendall = overlap = None
    if len(pairs) >= _FEWEST_PAIRS:
        first, second = np.array(pairs, np.float64).T
        if np.ptp(first) > 0 and np.ptp(second) > 0:
            spearman = float(stats.spearmanr(first, second).statistic)  # type: ignore[union-attr]
            kendall = float(stats.kendalltau(first, second).statistic)  # type: ignore[union-attr]
    complete = all(score is not None or bad for score, bad in zip(final, failed, strict=True))
    if complete and len(early) > top_k:
        last = [math.inf if bad or score is None else score for score, bad in zip(final, failed, strict=True)]
        overlap = top_k_overlap(early, last, top_k)
    return {
        "spearman": spearman,
        "kendall": kendall,
        "top_k": top_k,
        "top_k_overlap": overlap,
        "finished": len(pairs),
        "basis": "all" if complete and len(pairs) == len(early) else "survivors",
    }


@dataclass(frozen=True)
class Interval:
    """A difference and its bootstrap interval.

    Attributes:
      difference: of the weighted means.
      low: lower end.
      high: upper end.
      confidence: the interval's nominal coverage.
      examples: how many pairs it rests on.
    """

    difference: float
    low: float
    high: float
    confidence: float
    examples: int


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of ``mean(first) - mean(second)`` over examples that both models were measured on.

    Resampling whole examples keeps a hard example hard for both, which two separate intervals would not (Efron &
    Tibshirani 1993; Koehn 2004 for model comparison).

    Args:
      first: score of each example under the first model.
      second: score of the same examples under the second.
      weights: weight of each example in the mean; None for equal ones.
      confidence: nominal coverage.
      resamples: bootstrap samples.
      seed: of the resampling.

    Raises:
      ValueError: the lengths differ, or there is no example.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    weight = np.ones_like(difference) if weights is None else np.asarray(weights, np.float64)
    if len(first) != len(second) or difference.size == 0 or weight.shape != difference.shape:
        raise ValueError("a paired bootstrap needs the same examples, at least one, for both models")
    generator = np.random.default_rng(seed)
    total = weight * difference
    means = np.empty(resamples)
    for index in range(resamples):
        chosen = generator.integers(difference.size, size=difference.size)
        means[index] = total[chosen].sum() / weight[chosen].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(total.sum() / weight.sum()), float(low), float(high), confidence, int(difference.size))
