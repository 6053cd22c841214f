"""Several objectives as one score, anew for each proposal: ParEGO.

Each proposal is made for weights of its own, drawn from the study's seed and the trial's number, so that the trials
together spread over the trade-offs, and a study that was killed draws the same (Knowles 2006, IEEE Transactions on
Evolutionary Computation 10(1), section III).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxtune.search.objectives import SATISFIED
from jaxtune.search.observation import Observation

# What the sum adds to the largest part, so that of two trials with the same largest part the better one counts as such.
_AUGMENTED = 0.05
# An objective is scaled by what the best so far are apart from this quantile: a trial that nearly diverged would press
# all others together.
_QUANTILE = 0.75


def weights(count: int, *, seed: int, trial: int) -> Float[np.ndarray, " count"]:
    """Weights of the objectives, uniform among those that sum to 1.

    Args:
      count: of the objectives.
      seed: of the study.
      trial: that is to be proposed.
    """
    return np.random.default_rng((seed, trial, 3)).dirichlet(np.ones(count))


def chebyshev(
    values: Float[np.ndarray, "n objectives"], chosen: Float[np.ndarray, " objectives"]
) -> Float[np.ndarray, " n"]:
    """The augmented Chebyshev function, ``max_j w_j f_j + 0.05 sum_j w_j f_j`` (Knowles, eq. 2).

    Each objective is 0 at its best and 1 at the upper quartile of all; where that is the best as well, at its worst.

    Args:
      values: of each trial in each objective, lower is better, finite.
      chosen: weights of the objectives.
    """
    best = values.min(axis=0)
    scale = np.quantile(values, _QUANTILE, axis=0) - best
    scale = np.where(scale > 0, scale, values.max(axis=0) - best)
    parts = chosen * (values - best) / np.where(scale > 0, scale, 1.0)
    return parts.max(axis=1) + _AUGMENTED * parts.sum(axis=1)


def scalarised(told: Sequence[Observation], *, seed: int, trial: int) -> list[Observation]:
    """Observations of several objectives with one score each, for one proposal; of one objective they stay as they are.

    A trial that violates bounds of measured metrics counts as worse than all that satisfy them, by how much it violates
    them. One that lacks an objective counts as diverged.

    Args:
      told: scored trials, with all of their objectives.
      seed: of the study.
      trial: that is to be proposed.
    """
    sound = [one for one in told if one.score is not None and None not in one.objectives]
    if all(len(one.objectives) < 2 and one.violation == SATISFIED for one in sound) or not sound:
        return list(told)
    values = np.array([one.objectives for one in sound], np.float64)
    # Of one objective there is nothing to weigh, and its own scale is what the surrogate knows best.
    one_score = values[:, 0]
    if values.shape[1] > 1:
        one_score = chebyshev(values, weights(values.shape[1], seed=seed, trial=trial))
    satisfying = [score for score, one in zip(one_score, sound, strict=True) if one.violation == SATISFIED]
    worst, spread = max(satisfying, default=one_score.max()), float(np.ptp(one_score)) or 1.0
    scores = {}
    for score, one in zip(one_score, sound, strict=True):
        # Of a metric that is not known the excess has no measure: it is a whole bound's, and no more than that.
        penalty = spread * min(one.violation[1], 1.0)
        scores[id(one)] = float(score) if one.violation == SATISFIED else float(max(worst, score) + penalty)
    return [
        dataclasses.replace(one, score=scores.get(id(one)), standard_error=None, violation=SATISFIED) for one in told
    ]
