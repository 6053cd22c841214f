"""What a candidate is worth as the next trial, given what the surrogate says of it (``search.acquisition``)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

# An improvement smaller than this, in deviations of the warped scores, counts for nothing.
_LEAST_IMPROVEMENT = 0.01

Acquisition = Callable[
    [Float[np.ndarray, " n"], Float[np.ndarray, " n"], float, np.random.Generator], Float[np.ndarray, " n"]
]
"""``(mean, deviation, best, generator)`` to the worth of n candidates; that of largest worth is proposed.

Mean and deviation are of the noise-free warped score (lower is better), best is the lowest score told, and the
generator is that of the trial, so that replay repeats what is drawn.
"""


def expected_improvement(
    mean: Float[np.ndarray, " n"], deviation: Float[np.ndarray, " n"], best: float, generator: np.random.Generator
) -> Float[np.ndarray, " n"]:
    """By how much a candidate is expected to undercut the best score (Jones et al. 1998)."""
    from scipy.stats import norm

    del generator  # nothing is drawn
    worth = np.zeros_like(mean)
    unsure = deviation > 0
    improvement = best - _LEAST_IMPROVEMENT - mean[unsure]
    scaled = improvement / deviation[unsure]
    worth[unsure] = improvement * norm.cdf(scaled) + deviation[unsure] * norm.pdf(scaled)
    return worth


def thompson(
    mean: Float[np.ndarray, " n"], deviation: Float[np.ndarray, " n"], best: float, generator: np.random.Generator
) -> Float[np.ndarray, " n"]:
    """How low a draw from each candidate's own posterior lies: Thompson sampling (1933) with independent draws."""
    del best  # a draw is compared with the other draws
    return -(mean + deviation * generator.standard_normal(len(mean)))


ACQUISITIONS: dict[str, Acquisition] = {"thompson": thompson, "ei": expected_improvement}


def believed(
    acquisition: Acquisition, worth: Float[np.ndarray, " n"], factor: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The worth of candidates where the user believes something of them (:mod:`jaxtune.search.prior`).

    A positive acquisition is multiplied by what is left of the belief (πBO, Hvarfner et al. 2022). Thompson's draw has
    no sign: ``exp(-draw)``, which is positive and orders candidates alike, is multiplied, so that the logarithm of the
    factor is taken off the draw, in deviations of the warped scores. (That is a draw from a process whose prior mean
    is higher where little is believed.)
    """
    return worth + np.log(factor) if acquisition is thompson else worth * factor
