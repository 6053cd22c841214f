"""What the surrogate has learnt: the mean effect of each searched key, and how much of the variation it explains."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtune.search.space import Coordinate, Dimension, Point
from jaxtune.search.surrogate import Posterior

_GRID = 20
_BACKGROUND = 48


def _grid(dimension: Dimension) -> list[Coordinate]:
    """Coordinates that cover a dimension, all of them where it has few."""
    low, high = dimension.low, dimension.high
    if dimension.kind == "log_uniform":
        return [float(value) for value in np.geomspace(low, high, _GRID)]
    if dimension.kind == "uniform":
        return [float(value) for value in np.linspace(low, high, _GRID)]
    return sorted({round(value) for value in np.linspace(low, high, min(_GRID, int(high - low) + 1))})


def _background(posterior: Posterior, seed: int) -> list[Point]:
    sample = posterior.transformed.rvs(_BACKGROUND, random_state=np.random.RandomState(seed))
    return [posterior.space.snap(point) for point in sample]


def partial_dependence(
    posterior: Posterior, *, sign: float = 1.0, seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Partial dependence of the score on each key (Friedman 2001), and each key's share of the main effects.

    The other keys are averaged over a random sample of the space. The average and its posterior standard deviation are
    computed on the surrogate's scale and carried back to the scale of the score, where the band is half the distance
    between the images of mean ± one deviation. Of a key that does not always apply it is the effect where it does.

    Args:
      posterior: the process fitted to all scores.
      sign: -1 where the process saw negated scores (an objective that is maximised).
      seed: of the background sample.

    Returns:
      One ``{key, kind, values, mean, standard_deviation}`` per key, and a mapping from key to its share of the summed
      variances of the mean effects (first-order terms of functional ANOVA; sums to 1, or all 0 for a flat surrogate).
    """
    background = _background(posterior, seed)
    curves, variances = [], {}
    space = posterior.space
    for index, dimension in enumerate(space.dimensions):
        means, deviations = [], []
        grid = _grid(dimension)
        held = [point for point in background if space.applies_at(index, point)] or background
        for coordinate in grid:
            points = [space.settled([*point[:index], coordinate, *point[index + 1 :]]) for point in held]
            mean, covariance = posterior.predict(points)
            means.append(float(mean.mean()))
            deviations.append(float(np.sqrt(max(covariance.mean(), 0.0))))
        warped, deviation = np.array(means), np.array(deviations)
        variances[dimension.key] = float(warped.var())
        low, high = posterior.warp.inverse(warped - deviation), posterior.warp.inverse(warped + deviation)
        curves.append(
            {
                "key": dimension.key,
                "kind": dimension.kind,
                "values": [dimension.decode(coordinate) for coordinate in grid],
                "mean": [float(value) for value in sign * posterior.warp.inverse(warped)],
                "standard_deviation": [float(value) for value in (high - low) / 2],
            }
        )
    total = sum(variances.values())
    return curves, {key: variance / total if total > 0 else 0.0 for key, variance in variances.items()}
