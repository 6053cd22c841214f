"""Scores of several ways to train over the same seeds and test documents, and what each is against the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.config.metrics import Metric
from jaxtune.experiments.learning_curve import Measured
from jaxtune.experiments.paired import holm
from jaxtune.search.outcome import TestOutcome


def compared_scores(
    tests: Mapping[str, Sequence[TestOutcome]], first: str, metric: Metric, *, samples: int, confidence: float
) -> dict[str, dict[str, Any]]:
    """Mean scores and differences, with percentile intervals of a bootstrap of seeds and test documents.

    Both are drawn with replacement, the same draw for all, so that what makes a document hard for all cancels. Which
    differences are told from none is by Holm's method over all of them, at one less the confidence.

    Args:
      tests: of each name, one for each seed, on the same examples.
      first: the name that the others are compared with.
      metric: of the scores.
      samples: of the bootstrap.
      confidence: coverage of the intervals.

    Returns:
      By name ``score`` (value, low, high), and ``against``: ``difference`` from the first, in the score's own
      direction, ``low``, ``high``, ``p`` (two-sided, Efron & Tibshirani 1993, 15.4) and ``told_apart``; None for the
      first itself.
    """
    names = list(tests)
    example = tests[first][0]
    assert example.per_example is not None
    weights = np.ones(len(example.per_example)) if example.weights is None else np.asarray(example.weights, np.float64)

    def numerators(outcome: TestOutcome) -> np.ndarray:
        # What weighs nothing has no score, and 0 × NaN is no number.
        return np.where(weights > 0, np.asarray(outcome.per_example, np.float64), 0.0) * weights

    measured = Measured.of(
        range(len(names)),
        np.stack([[numerators(outcome) for outcome in tests[name]] for name in names]),
        weights,
        strata=example.strata,
        clusters=example.clusters,
        direction=metric.direction,
        limit=metric.best,
    )
    means, drawn = measured.means(), measured.draws(samples)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    found: dict[str, dict[str, Any]] = {}
    reference = names.index(first)
    for place, name in enumerate(names):
        low, high = np.nanquantile(drawn[:, place], ends)
        found[name] = {"score": {"value": float(means[place]), "low": float(low), "high": float(high)}, "against": None}
        if place == reference:
            continue
        each = drawn[:, place] - drawn[:, reference]
        each = each[np.isfinite(each)]
        low, high = np.quantile(each, ends)
        tail = min(float(np.mean(each <= 0)), float(np.mean(each >= 0)))
        found[name]["against"] = {
            "difference": float(means[place] - means[reference]),
            "low": float(low),
            "high": float(high),
            "p": min(1.0, max(2 * tail, 1 / samples)),
        }
    others = [entry["against"] for entry in found.values() if entry["against"] is not None]
    for against, told in zip(others, holm([entry["p"] for entry in others], 1 - confidence), strict=True):
        against["told_apart"] = told
    return found
