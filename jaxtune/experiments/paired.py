"""Paired comparisons over repetitions: the same seeds, with and without a change."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from jaxtune.experiments.agreement import Interval


def paired_interval(first: Sequence[float], second: Sequence[float], confidence: float) -> tuple[Interval, int]:
    """The mean of ``first - second`` over pairs, with Student's t interval.

    With the handful of repetitions that one can afford, a bootstrap interval would be too narrow; the t interval takes
    the few differences as draws from a normal distribution: mean ± t_{n-1} s / √n.

    Args:
      first: scores, one for each seed; not finite where a run diverged.
      second: scores of the same seeds in the same order.
      confidence: coverage of the interval.

    Returns:
      The mean difference (NaN without a pair), its interval (NaN with fewer than two), and the number of pairs: those
      with two finite scores.
    """
    differences = np.subtract(first, second, dtype=np.float64)
    differences = differences[np.isfinite(differences)]
    pairs = len(differences)
    if pairs < 2:
        return Interval(float(differences.mean()) if pairs else math.nan, math.nan, math.nan), pairs
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(pairs)
    half = float(stats.t.ppf((1 + confidence) / 2, pairs - 1)) * error
    return Interval(mean, mean - half, mean + half), pairs


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's method rejects, so that the chance of any false rejection is below ``level``."""
    rejected = [False] * len(p_values)
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        if p_values[at] > level / (len(p_values) - rank):
            break
        rejected[at] = True
    return rejected
