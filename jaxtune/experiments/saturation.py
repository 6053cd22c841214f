"""Where gains end by the gap to the largest size: models of all sizes on the same seeds and the same test documents.

What makes a seed's draw lucky or a test document hard is the same for all sizes, so it cancels in the gap: a gap is
known far better than the two scores that it lies between.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxtune.experiments.learning_curve import Measured

SHARE = 0.1
"""The part of the whole gain that is too little to go on for."""

CONFIDENCE = 0.95

GAP_RULE = (
    "the smallest size whose gap to the largest, paired over seeds and test documents, is below a tenth of what the "
    "largest gains over the smallest (one-sided bound at 95 %)"
)


@dataclasses.dataclass(frozen=True)
class Gap:
    """How much better the largest size is than another one.

    Attributes:
      size: the other one.
      gap: positive where the largest is better, in the score's own units.
      bound: the gap is below this with a probability of 95 %.
      is_small: whether the bound is below a tenth of the gain of the largest size over the smallest.
    """

    size: int
    gap: float
    bound: float
    is_small: bool


def gaps_to_largest(measured: Measured, *, samples: int, seed: int = 0) -> list[Gap]:
    """The gaps of all sizes but the largest, ascending.

    The bound is the 95 % quantile of a bootstrap that draws seeds and test documents with replacement, the same ones
    for all sizes (Efron & Tibshirani 1993, 13; crossed as in Owen & Eckles 2012).

    Args:
      measured: scores by size, seed and test example.
      samples: draws of the bootstrap.
      seed: of the draws.
    """
    means, drawn = measured.means(), measured.draws(samples, seed)
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    gaps = measured.sign * (means - means[-1])
    bounds = np.quantile(measured.sign * (drawn - drawn[:, -1:]), CONFIDENCE, axis=0)
    most = SHARE * gaps[0]
    return [
        Gap(int(size), float(gap), float(bound), bool(bound < most))
        for size, gap, bound in zip(measured.sizes[:-1], gaps, bounds, strict=False)
    ]
