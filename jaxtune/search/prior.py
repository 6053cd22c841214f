"""What the user believes about the searched keys before any score: a density over the space, and draws from it.

Each dimension is looked at in normalised coordinates, 0 to 1 over its range: in the logarithm of a ``log_uniform`` one,
in equal cells for the values of the discrete ones. A belief is a normal distribution around the prior value, cut off at
the ends of the range, whose standard deviation says how sure it is:

========== ================== ==================================================
confidence standard deviation a choice's prior value, in weights of another value
========== ================== ==================================================
low        0.5 of the range   2
medium     0.25               4
high       0.125              6
========== ================== ==================================================

(0.25 is that of PriorBand, Mallik et al. 2023.) Of numbers a tenth of the density stays uniform, so that nothing is
ruled out. Dimensions are independent, those without a prior uniform.

The belief is forgotten as scores come in. An acquisition is multiplied by ``density^(β / n)`` after n scores (πBO,
Hvarfner et al. 2022, eq. 6); n counts from 1, and no exponent is above 1. A random draw is one of the belief with
probability ``β / (β + n)``, one of the whole space otherwise (the mixture of PriorBand, whose weight falls likewise);
there n counts trials, so that a draw follows from the seed and the trial alone.

The Gaussian process also *drops* a belief that scores contradict: once trials have scored the better the less likely
they are under it, by Spearman's rank correlation of score and density, one-sided at 5 % of a belief that says nothing
of the scores (:meth:`Prior.contradicted`). From then on it proposes as if there had been none. Each new score is
another look, so that of beliefs that say nothing about one in seven is dropped within 20 scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxtune.search.space import Dimension, Point, Space

WIDTHS = {"low": 0.5, "medium": 0.25, "high": 0.125}
"""Standard deviation of a belief by its confidence, as a share of the range."""

WEIGHTS = {"low": 2.0, "medium": 4.0, "high": 6.0}
"""What a choice's prior value weighs beside each other value, by confidence."""

# β: after so many trials half of all draws are the belief's, and from so many scores on it fades in an acquisition. 2,
# 5 and 10 could not be told apart on learning curves, whatever the prior; the least trusts it least.
_LASTS = 2.0
# The belief is dropped where ranks as contrary would come by chance this rarely, of so many scores at least.
_LEVEL, _FEWEST_SCORES = 0.05, 6
# The share of every density that is uniform.
_UNIFORM = 0.1
# A continuous range is cut into so many cells of constant density.
_CELLS = 4096


class Marginal:
    """The belief about one dimension, as a density of constant pieces over [0, 1].

    Args:
      dimension: with or without a prior.
    """

    def __init__(self, dimension: Dimension):
        self._dimension = dimension
        count = dimension.size or _CELLS
        self._edges = np.linspace(0.0, 1.0, count + 1)
        self._mass = self._masses(count)

    def _masses(self, count: int) -> Float[np.ndarray, " cells"]:
        """The probability of each cell."""
        from scipy.special import ndtr

        dimension, uniform = self._dimension, np.full(count, 1.0 / count)
        if dimension.prior is None:
            return uniform
        if dimension.kind == "choice":
            weights = np.ones(count)
            weights[int(dimension.prior)] = WEIGHTS[dimension.confidence]
            return weights / weights.sum()
        centre = float(self.positions([dimension.prior])[0])
        normal = np.diff(ndtr((self._edges - centre) / WIDTHS[dimension.confidence]))
        return _UNIFORM * uniform + (1 - _UNIFORM) * normal / normal.sum()

    def positions(self, coordinates: Sequence[Any]) -> Float[np.ndarray, " n"]:
        """Coordinates in [0, 1]; a discrete one is the middle of its cell."""
        dimension, values = self._dimension, np.asarray(coordinates, np.float64)
        low, high = float(dimension.low), float(dimension.high)
        if not dimension.continuous:
            return (values - low + 0.5) / (high - low + 1)
        if dimension.kind == "log_uniform":
            values, low, high = np.log(values), math.log(low), math.log(high)
        return np.clip((values - low) / (high - low), 0.0, 1.0)

    def quantiles(self, shares: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The places in [0, 1) below which the belief has these shares of its mass."""
        places = np.interp(shares, np.concatenate([[0.0], np.cumsum(self._mass)]), self._edges)
        return np.minimum(places, np.nextafter(1.0, 0.0))

    def density(self, coordinates: Sequence[Any]) -> Float[np.ndarray, " n"]:
        """The density at coordinates, where a uniform one is 1."""
        count = len(self._mass)
        cells = np.minimum((self.positions(coordinates) * count).astype(int), count - 1)
        return self._mass[cells] * count


class Prior:
    """The belief about a whole space.

    Args:
      space: of which some dimension has a prior.
    """

    def __init__(self, space: Space):
        self._space = space

    @classmethod
    def of(cls, space: Space) -> Prior | None:
        """The belief about a space; None where no dimension has a prior."""
        return cls(space) if any(dimension.prior is not None for dimension in space.dimensions) else None

    @cached_property
    def _marginals(self) -> list[Marginal]:
        return [Marginal(dimension) for dimension in self._space.dimensions]

    def points(self, shares: Float[np.ndarray, "n dimensions"]) -> list[Point]:
        """The points at shares of the belief's mass, dimension by dimension: of uniform shares, draws of the belief."""
        columns = [marginal.quantiles(shares[:, at]) for at, marginal in enumerate(self._marginals)]
        return [self._space.at(row) for row in np.stack(columns, axis=1)]

    def design(self, shares: Float[np.ndarray, "n dimensions"]) -> list[Point]:
        """Points that fill the belief where ``shares`` fill the unit cube; the first one has all prior values."""
        points = self.points(shares)
        for at, dimension in enumerate(self._space.dimensions):
            if dimension.prior is not None and points:
                points[0][at] = dimension.prior
        return [self._space.snap(point) for point in points]

    def draw(self, generator: np.random.Generator, count: int, trial: int) -> list[Point]:
        """Random points for a trial: of the belief while it lasts, else of the whole space."""
        shares = generator.random((count, len(self._marginals)))
        believed = generator.random(count) < self._share(trial)
        either = zip(believed, self.points(shares), map(self._space.at, shares), strict=True)
        return [drawn if believes else anywhere for believes, drawn, anywhere in either]

    def order(self, generator: np.random.Generator, points: Sequence[Point], trial: int) -> list[Point]:
        """All of a finite space in the order of drawing one after another without putting any back."""
        share = self._share(trial)
        weights = share * self.density(points) + 1 - share
        # The largest of logarithms with Gumbel noise is a draw by weight, the next one a draw among the others.
        keys = np.log(weights) + generator.gumbel(size=len(points))
        return [points[at] for at in np.argsort(-keys, kind="stable")]

    def density(self, points: Sequence[Point]) -> Float[np.ndarray, " n"]:
        """The density at points, where a uniform one is 1."""
        columns = zip(*points, strict=True)
        factors = [marginal.density(column) for marginal, column in zip(self._marginals, columns, strict=True)]
        return np.prod(factors, axis=0)

    def factor(self, points: Sequence[Point], scores: int) -> Float[np.ndarray, " n"]:
        """What a positive acquisition at points is multiplied by after so many scores."""
        return self.density(points) ** min(1.0, _LASTS / max(scores, 1))

    def contradicted(self, points: Sequence[Point], scores: Sequence[float]) -> int | None:
        """How many of the first scored trials contradict the belief; None where no first part of them does.

        Looking at each first part, rather than at all of them, lets the answer stay what it was when scores are added.

        Args:
          points: of trials, in the order of their numbers.
          scores: lower is better.
        """
        from scipy.stats import spearmanr

        likely = self.density(points) if points else np.zeros(0)
        for count in range(_FEWEST_SCORES, len(points) + 1):
            first, told = likely[:count], np.asarray(scores[:count], np.float64)
            if np.ptp(first) == 0 or np.ptp(told) == 0:
                continue
            # SciPy's annotations do not tell what it returns.
            found: Any = spearmanr(told, first, alternative="greater")
            if found.pvalue < _LEVEL:
                return count
        return None

    @staticmethod
    def _share(trial: int) -> float:
        return _LASTS / (_LASTS + trial)
