"""A saturating power law of the number of training documents: where a learning curve ends, and what more data buys.

    L(n) = c ± a (n + n0)^-b = c ± g (1 + n / n0)^-b,     g = a n0^-b,

the shape that learning curves were found to have over many tasks (Hestness et al. 2017, arXiv:1712.00409; with the
offset n0, which lets the curve start at a finite score without any document, Rosenfeld et al. 2020, arXiv:1909.12673).
The sign is + for a loss and - for a score that is maximised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num
from scipy import optimize

from jaxtune.config.metrics import Direction, Goal

FEWEST_SIZES = 4
"""The curve has four parameters."""

_EXPONENTS = (0.05, 4.0)
# The offset's range, as shares of the smallest size above 0 and multiples of the largest one.
_OFFSETS = (0.01, 10.0)
_GRID = 30


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted curve.

    Attributes:
      ceiling: c, the score of unlimited data, in the score's units.
      gain: g >= 0, by how much the ceiling is better than the score without any document.
      exponent: b.
      offset: n0, in documents.
      direction: whether the score is minimised or maximised.
      residual: root mean square of the scores around the curve.
    """

    ceiling: float
    gain: float
    exponent: float
    offset: float
    direction: Direction
    residual: float

    @property
    def coefficient(self) -> float:
        """a = g n0^b."""
        return self.gain * self.offset**self.exponent

    def __call__(self, sizes: Sequence[float | int] | Num[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The score at each size."""
        shape = (1.0 + np.asarray(sizes, np.float64) / self.offset) ** -self.exponent
        return self.ceiling + Goal(self.direction).sign * self.gain * shape

    def improvement(self, start: float | int, end: float | int) -> float:
        """By how much the score at ``end`` documents is better than at ``start``; positive for more documents."""
        first, second = self([start, end])
        return Goal(self.direction).gain(float(first), float(second))

    def size_within(self, epsilon: float) -> float:
        """The number of documents from which on the curve is within ``epsilon`` > 0 of its ceiling."""
        if self.gain <= epsilon:
            return 0.0
        # A flat exponent and a small epsilon ask for more documents than a float can count.
        with np.errstate(over="ignore"):
            return float(self.offset * (np.power(self.gain / epsilon, 1.0 / self.exponent) - 1.0))


def fit_power_law(
    sizes: Sequence[int] | Num[np.ndarray, " n"],
    scores: Sequence[float] | Float[np.ndarray, " n"],
    *,
    direction: Direction = "min",
    limit: float | None = None,
) -> PowerLaw:
    """Least squares over sizes, all with the same weight.

    For a given exponent and offset the curve is linear in ceiling and gain, which are solved for exactly (variable
    projection, Golub & Pereyra 1973); the other two start from the best of a grid.

    Args:
      sizes: documents, ascending, at least :data:`FEWEST_SIZES`; may begin with 0.
      scores: one for each size.
      direction: whether they are minimised or maximised.
      limit: the best score there can be (0 for a loss, 1 for a share); the ceiling does not pass it.

    Raises:
      ValueError: there are too few sizes, or a score is not finite.
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(scores, np.float64)
    if len(x) < FEWEST_SIZES:
        raise ValueError(f"a curve with {FEWEST_SIZES} parameters needs {FEWEST_SIZES} sizes, not {len(x)}")
    if not np.isfinite(y).all():
        raise ValueError("a curve needs finite scores")
    sign = Goal(direction).sign
    lower = -np.inf if limit is None else sign * limit
    targets = sign * y
    positive = x[x > 0]
    bounds = np.log([[_EXPONENTS[0], positive[0] * _OFFSETS[0]], [_EXPONENTS[1], positive[-1] * _OFFSETS[1]]])
    grid = np.stack(
        np.meshgrid(*(np.linspace(low, high, _GRID) for low, high in bounds.T), indexing="ij"), axis=-1
    ).reshape(-1, 2)
    _, _, errors = _solve(_shapes(grid, x), targets, lower)

    def residuals(parameters: Float[np.ndarray, " 2"]) -> Float[np.ndarray, " n"]:
        shape = _shapes(parameters[None], x)
        ceiling, gain, _ = _solve(shape, targets, lower)
        return ceiling[0] + gain[0] * shape[0] - targets

    start = grid[int(np.argmin(errors))]
    found = optimize.least_squares(
        residuals, start, bounds=(bounds[0], bounds[1]), max_nfev=60, xtol=1e-12, ftol=1e-12, gtol=1e-12
    )
    # The refinement never makes it worse, but a projection that meets its bound has a kink where it can stand still.
    best = found.x if 2 * found.cost <= errors.min() else start
    ceiling, gain, error = _solve(_shapes(best[None], x), targets, lower)
    exponent, offset = np.exp(best)
    return PowerLaw(
        ceiling=float(sign * ceiling[0]),
        gain=float(gain[0]),
        exponent=float(exponent),
        offset=float(offset),
        direction=direction,
        residual=float(np.sqrt(error[0] / len(x))),
    )


def _shapes(parameters: Float[np.ndarray, "m 2"], sizes: Float[np.ndarray, " n"]) -> Float[np.ndarray, "m n"]:
    """(1 + n / n0)^-b for each pair of log b and log n0."""
    exponents, offsets = np.exp(parameters).T
    return np.exp(-exponents[:, None] * np.log1p(sizes / offsets[:, None]))


def _solve(
    shapes: Float[np.ndarray, "m n"], targets: Float[np.ndarray, " n"], lower: float
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Ceiling >= ``lower``, gain >= 0 and the squared error of the best ``ceiling + gain * shape``, for each shape.

    A convex problem in two unknowns: where the free optimum breaks a bound, the best one lies on a bound.
    """
    mean, centred = targets.mean(), targets - targets.mean()
    spread = shapes - shapes.mean(axis=1, keepdims=True)
    free_gain = (spread @ centred) / np.maximum((spread**2).sum(axis=1), 1e-300)
    free_ceiling = mean - free_gain * shapes.mean(axis=1)
    at_limit = np.full(len(shapes), lower if np.isfinite(lower) else mean)
    limit_gain = np.maximum((shapes * (targets - at_limit[:, None])).sum(axis=1) / (shapes**2).sum(axis=1), 0.0)
    flat = np.full(len(shapes), max(mean, lower))
    ceilings = np.stack([free_ceiling, at_limit, flat])
    gains = np.stack([free_gain, limit_gain, np.zeros(len(shapes))])
    errors = ((ceilings[..., None] + gains[..., None] * shapes - targets) ** 2).sum(axis=-1)
    errors[0] = np.where((free_gain >= 0) & (free_ceiling >= lower), errors[0], np.inf)
    pick = np.argmin(errors, axis=0)
    rows = np.arange(len(shapes))
    return ceilings[pick, rows], gains[pick, rows], errors[pick, rows]
