"""Scores as the surrogate sees them: the bad tail compressed, then standardised.

A Gaussian process on raw scores is flattened by a few terrible trials. The logarithm of a score's excess over the best
one spreads the good trials, where the choice is made, and draws the bad ones together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# The floor of the logarithm, as a share of the typical excess: low enough to spread the good trials, high enough that
# the best one does not become an outlier itself.
_FLOOR = 0.3


@dataclass(frozen=True)
class Warp:
    """``w = (log((y - best) / spread + floor) - mean) / deviation``, increasing in the score y (lower is better).

    Attributes:
      best: the lowest score.
      spread: the median excess over the best one, in units of the score.
      mean: mean of the logarithms.
      deviation: their standard deviation.
    """

    best: float
    spread: float
    mean: float
    deviation: float

    @classmethod
    def fit(cls, scores: Sequence[float]) -> Warp:
        """The warp of a set of finite scores (lower is better).

        Raises:
          ValueError: ``scores`` is empty or not finite.
        """
        values = np.asarray(scores, np.float64)
        if values.size == 0 or not np.all(np.isfinite(values)):
            raise ValueError("a warp needs finite scores")
        best = float(values.min())
        excess = values - best
        positive = excess[excess > 0]
        spread = float(np.median(positive)) if positive.size else 1.0
        logarithms = np.log(excess / spread + _FLOOR)
        deviation = float(logarithms.std())
        return cls(best, spread, float(logarithms.mean()), deviation if deviation > 0 else 1.0)

    def forward(self, scores: Sequence[float] | Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Scores (none below ``best``) to warped scores."""
        excess = np.maximum(np.asarray(scores, np.float64) - self.best, 0.0)
        return (np.log(excess / self.spread + _FLOOR) - self.mean) / self.deviation

    def inverse(self, warped: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Warped scores back to the scale of the score; below ``best`` the curve ends at ``best - floor * spread``."""
        return self.best + self.spread * (np.exp(warped * self.deviation + self.mean) - _FLOOR)

    def slope(self, scores: Sequence[float] | Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The derivative of :meth:`forward`, which carries a standard error over to the warped scale (delta method)."""
        excess = np.maximum(np.asarray(scores, np.float64) - self.best, 0.0)
        return 1.0 / ((excess + _FLOOR * self.spread) * self.deviation)
