"""How well early scores agree with final ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Fewer pairs than this give a rank correlation no meaning.
_FEWEST_PAIRS = 3


def top_k_overlap(early: Sequence[float], final: Sequence[float], k: int) -> int:
    """How many of the ``k`` best by early score are among the ``k`` best by final score (lower is better).

    Ties are broken by position, the same way on both sides. A trial that diverged, whose score is infinite, is among no
    best.
    """
    groups = []
    for scores in (early, final):
        order = np.argsort(np.asarray(scores, np.float64), kind="stable")[:k]
        groups.append({index for index in order.tolist() if math.isfinite(scores[index])})
    return len(groups[0] & groups[1])


def t_interval(values: Sequence[float], confidence: float) -> tuple[float | None, float | None, float | None]:
    """The mean with Student's t interval: mean ± t_{n-1} s / √n.

    The few repetitions that one can afford are taken as draws from a normal distribution; a bootstrap interval of them
    would be too narrow.

    Args:
      values: scores with different seeds, all finite.
      confidence: coverage of the interval.

    Returns:
      The mean, and the interval's ends; None where there are too few values.
    """
    from scipy import stats

    count = len(values)
    if count == 0:
        return None, None, None
    mean = float(np.mean(values))
    if count == 1:
        return mean, None, None
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def rank_agreement(
    early: Sequence[float], final: Sequence[float | None], *, top_k: int, failed: Sequence[bool]
) -> dict[str, Any]:
    """How the order at the fraction agrees with the order at the end.

    Args:
      early: early score of each trial, lower is better; infinite where the trial diverged.
      final: final score of each trial, lower is better; None where the trial was not finished.
      top_k: size of the two leading groups that are compared.
      failed: whether each trial diverged; such a trial needs no final score and is in no leading group.

    Returns:
      ``spearman`` and ``kendall`` (tau-b) over finished trials, ``top_k``, ``top_k_overlap`` (trials in both leading
      groups; None unless *every* trial was finished or diverged, there are more than ``top_k``, and so many did not
      diverge), ``finished`` (the number of pairs) and ``basis``: ``all`` where every trial that did not diverge is
      finished, ``survivors`` where only the promoted ones are, whose narrow range of scores makes a correlation smaller
      than it is over all. What is not known is None.
    """
    # Half a second of import, which a search's first trial need not wait for.
    from scipy import stats

    pairs = [(a, b) for a, b, bad in zip(early, final, failed, strict=True) if b is not None and not bad]
    spearman = kendall = overlap = None
    if len(pairs) >= _FEWEST_PAIRS:
        first, second = np.array(pairs, np.float64).T
        if np.ptp(first) > 0 and np.ptp(second) > 0:
            spearman = float(stats.spearmanr(first, second).statistic)  # type: ignore[union-attr]
            kendall = float(stats.kendalltau(first, second).statistic)  # type: ignore[union-attr]
    complete = all(score is not None or bad for score, bad in zip(final, failed, strict=True))
    if complete and len(early) > top_k <= len(pairs):
        last = [math.inf if bad or score is None else score for score, bad in zip(final, failed, strict=True)]
        overlap = top_k_overlap(early, last, top_k)
    return {
        "spearman": spearman,
        "kendall": kendall,
        "top_k": top_k,
        "top_k_overlap": overlap,
        "finished": len(pairs),
        "basis": "all" if complete else "survivors",
    }
