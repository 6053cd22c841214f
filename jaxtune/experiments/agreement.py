"""How well scores at a fraction foretell final ones, with bootstrap intervals over trials.

An interval answers: had the design held other trials of the same space, how different could the figure be? Trials are
drawn with replacement, and every figure is computed again on each draw. Copies of one trial are ties with themselves,
which average ranks and Kendall's tau-b leave out of account.

A trial that diverged has no score to correlate: it is left out of the correlations, as in the ``rank_agreement`` of a
search, is in no leading group, and ranks last in the choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

Scores = Float[np.ndarray, "draws n"]
"""Scores of the trials of each draw, lower is better, infinite where a trial diverged."""

TOP = 5
"""Size of the leading groups that are compared: the paper's."""


REGRET_WIDENING, REGRET_STRETCH = 5.0, 1.5
"""By what the part that a regret's interval leaves out is divided before percentiles are taken, and what its upper end
is multiplied by: a lucky design does not know how far apart its trials might have been."""

_INNER_DESIGNS = 40
"""Designs drawn from each draw of a regret's second bootstrap, which has a tenth of the first one's draws."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with its percentile interval.

    Attributes:
      value: over all trials; NaN where it is not defined (all scores equal), infinite where nothing but diverged trials
        was chosen.
      low: lower end; NaN where no draw defines the figure.
      high: upper end.
    """

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: what is no finite number is None."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}


def draw_trials(trials: int, samples: int, seed: int = 0) -> Int[np.ndarray, "samples n"]:
    """Trial numbers drawn with replacement, sorted within each draw so that ties keep the order of the trials."""
    return np.sort(np.random.default_rng(seed).integers(trials, size=(samples, trials)), axis=1)


def _ranks(scores: Float[np.ndarray, "draws n"], used: Bool[np.ndarray, "draws n"]) -> Float[np.ndarray, "draws n"]:
    """Average ranks among the used scores; NaN for the others."""
    return stats.rankdata(np.where(used, scores, np.nan), axis=-1, nan_policy="omit")


def spearman(early: Scores, final: Scores) -> Float[np.ndarray, " draws"]:
    """Spearman's rank correlation over trials with two finite scores; NaN where a side is constant."""
    used = np.isfinite(early) & np.isfinite(final)
    first, second = _ranks(early, used), _ranks(final, used)
    count = np.maximum(used.sum(-1, keepdims=True), 1)

    def centred(ranks: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, "draws n"]:
        filled = np.where(used, ranks, 0.0)
        return np.where(used, filled - filled.sum(-1, keepdims=True) / count, 0.0)

    a, b = centred(first), centred(second)
    return _over((a * b).sum(-1), np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def kendall(early: Scores, final: Scores) -> Float[np.ndarray, " draws"]:
    """Kendall's tau-b over trials with two finite scores; NaN where a side is constant."""
    used = np.isfinite(early) & np.isfinite(final)
    pairs = used[..., :, None] & used[..., None, :]

    def order(scores: Scores) -> Float[np.ndarray, "draws n n"]:
        finite = np.where(used, scores, 0.0)
        return np.where(pairs, np.sign(finite[..., :, None] - finite[..., None, :]), 0.0)

    a, b = order(early), order(final)
    axes = (-2, -1)
    return _over((a * b).sum(axes), np.sqrt((a * a).sum(axes) * (b * b).sum(axes)))


def _over(part: Float[np.ndarray, " draws"], whole: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)


def top_overlap(early: Scores, final: Scores, k: int = TOP) -> Float[np.ndarray, " draws"]:
    """How many of the ``k`` best early trials are among the ``k`` best final ones; ties go to the earlier trial.

    One that diverged is not among them.
    """

    def leading(scores: Scores) -> Bool[np.ndarray, "draws n"]:
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, np.argsort(scores, axis=-1, kind="stable")[..., :k], True, axis=-1)
        return chosen & np.isfinite(scores)

    return (leading(early) & leading(final)).sum(-1).astype(np.float64)


def regret(early: Scores, final: Scores, k: int = 1) -> Float[np.ndarray, " draws"]:
    """What choosing early costs: the best final score among the ``k`` best early trials, less the best of all.

    Infinite where all ``k`` diverge before their end; NaN where every trial does.
    """
    chosen = np.argsort(early, axis=-1, kind="stable")[..., :k]
    got = np.take_along_axis(final, chosen, axis=-1).min(-1)
    best = final.min(-1)
    return np.where(np.isfinite(best), got - np.where(np.isfinite(best), best, 0.0), np.nan)


def interval(value: float, drawn: Float[np.ndarray, " draws"], confidence: float) -> Interval:
    """The percentile interval (Efron & Tibshirani 1993) of the draws that define the figure."""
    defined = drawn[~np.isnan(drawn)]
    low = high = math.nan
    if defined.size:
        ends = [(1 - confidence) / 2, (1 + confidence) / 2]
        # Infinite draws are to be ranked, not to be averaged with their neighbours.
        low, high = (float(end) for end in np.quantile(defined, ends, method="closest_observation"))
    return Interval(value, low, high)


def regret_interval(
    early: Float[np.ndarray, " n"],
    final: Float[np.ndarray, " n"],
    k: int,
    *,
    samples: int,
    confidence: float,
    seed: int = 0,
) -> Interval:
    """The regret of finishing the best ``k`` early trials, with an interval for its mean over designs of this size.

    One design has one regret, mostly near 0 and now and then large, and its best trial is in two of three bootstrap
    draws: percentiles of the draws cover the mean regret of other designs far less often than they say. Two bootstraps
    fail in different places. The regrets of single draws know how large a regret can be, but not that it might be other
    than 0 where all draws say 0; means over designs that are drawn from a draw know the latter. Both leave out less
    than asked for (calibration: Loh 1987), and the wider ends count. ``benchmarks/regret_coverage.py`` measures how
    often the interval covers.

    Args:
      early: score of each trial at the fraction, lower is better; infinite where it had diverged.
      final: score at the end, likewise.
      k: how many trials are finished.
      samples: draws of the first bootstrap.
      confidence: coverage of the interval.
      seed: of the draws.
    """
    count, wide = len(early), 1 - (1 - confidence) / REGRET_WIDENING
    drawn = draw_trials(count, samples, seed)
    single = regret(early[drawn], final[drawn], k)
    generator = np.random.default_rng([seed, 1])
    outer = generator.integers(count, size=(max(samples // 10, 10), 1, count))
    inner = generator.integers(count, size=(len(outer), _INNER_DESIGNS, count))
    designs = np.sort(np.take_along_axis(outer, inner, axis=-1), axis=-1).reshape(-1, count)
    each = regret(early[designs], final[designs], k).reshape(len(outer), _INNER_DESIGNS)
    finite = np.isfinite(each)
    means = np.where(finite, each, 0.0).sum(axis=1) / np.where(finite.any(axis=1), finite.sum(axis=1), np.nan)
    value = float(regret(early[None], final[None], k)[0])
    first, second = interval(value, single, wide), interval(value, means, wide)
    # NaN where no draw defines the figure.
    high = REGRET_STRETCH * float(np.fmax(first.high, second.high))
    return Interval(value, float(np.fmin(first.low, second.low)), high)


def agreement(
    early: Float[np.ndarray, " n"],
    final: Float[np.ndarray, " n"],
    *,
    promote: int,
    samples: int,
    confidence: float,
    seed: int = 0,
) -> Mapping[str, Any]:
    """All figures of one fraction.

    Args:
      early: score of each trial at the fraction, lower is better; infinite where it had diverged.
      final: score at the end, likewise.
      promote: how many trials a search would finish.
      samples: bootstrap draws.
      confidence: coverage of the intervals.
      seed: of the draws; the same for all fractions, so that their figures are compared on the same draws.

    Returns:
      ``spearman``, ``kendall``, ``top_5_overlap``, ``regret`` (of finishing the best trial alone) and
      ``regret_promoted`` (of finishing the best ``promote``), each with ``value``, ``low`` and ``high``.
    """
    drawn = draw_trials(len(early), samples, seed)
    measures = {"spearman": spearman, "kendall": kendall, "top_5_overlap": top_overlap}
    figures = {
        name: interval(float(measure(early[None], final[None])[0]), measure(early[drawn], final[drawn]), confidence)
        for name, measure in measures.items()
    }
    for name, finished in (("regret", 1), ("regret_promoted", promote)):
        figures[name] = regret_interval(early, final, finished, samples=samples, confidence=confidence, seed=seed)
    return {name: figure.as_dict() for name, figure in figures.items()}
