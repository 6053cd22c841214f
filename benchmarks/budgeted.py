"""Search strategies that spend a budget of full trainings on a landscape: what proposes, how trials are finished.

Half of a budget goes into scoring trials at a fraction of their steps, half into finishing the best ones. What is
proposed does not depend on how trials are finished, so one run of proposals is finished in every way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from landscapes import Landscape, Trials
from replay import INITIAL

from jaxtune.search.finishing import promotions
from jaxtune.search.methods import make_method
from jaxtune.search.surrogate import Surrogate

FRACTION, FINISHING = 0.2, 0.5
BUDGETS = (4, 8, 16)

# Name: search.method and search.acquisition.
PROPOSERS = {
    "random": ("random", "ei"),
    "Sobol": ("sobol", "ei"),
    "TPE": ("tpe", "ei"),
    "gp, ei": ("gp", "ei"),
    "gp, thompson": ("gp", "thompson"),
}


MEAN_THEN_SCORE = "mean, then score"


@dataclass(frozen=True)
class Ending:
    """How the best trials are finished.

    Attributes:
      finish: shares of the steps after the fraction; the last one is 1.
      by: what promotes at each: the ``score`` itself, or the ``mean`` of the Gaussian process at the trial, or
        one after the other.
    """

    finish: tuple[float, ...]
    by: str

    @property
    def name(self) -> str:
        """For tables."""
        rungs = "straight" if len(self.finish) == 1 else "rungs " + ", ".join(f"{share:g}" for share in self.finish)
        return f"{rungs}, by {self.by}"

    def by_mean(self, share: float) -> bool:
        """Whether trials scored at a share are promoted by posterior mean."""
        return self.by == "mean" or (self.by == MEAN_THEN_SCORE and share == FRACTION)

    def counts(self, budget: float) -> tuple[int, ...]:
        """How many trials are trained on to each share."""
        straight = max(1, round(FINISHING * budget / (1 - FRACTION)))
        return promotions(straight, FRACTION, self.finish)

    def early(self, budget: float) -> float:
        """What is left of a budget for first scores."""
        climbs = [high - low for low, high in itertools.pairwise((FRACTION, *self.finish))]
        return budget - sum(count * climb for count, climb in zip(self.counts(budget), climbs, strict=True))


ENDINGS = tuple(Ending(finish, by) for finish in ((1.0,), (0.4, 1.0)) for by in ("mean", "score"))
# What studies did before promotion was compared: worth knowing of what proposes best alone.
FURTHER = {"gp, thompson": (Ending((0.4, 1.0), MEAN_THEN_SCORE),)}


def propose(landscape: Landscape, proposer: str, seed: int, budget: float) -> Trials:
    """Scores trials at the fraction until a budget is spent; a proposal does not know the trial before it."""
    name, acquisition = PROPOSERS[proposer]
    method = make_method(name, landscape.space, seed=seed, initial=INITIAL, acquisition=acquisition)
    trials, spent = landscape.begin(seed), 0.0
    while spent + FRACTION <= budget + 1e-9 and not trials.exhausted:
        number = len(trials.points) + 1
        told = [trials.observation(trial, FRACTION) for trial in range(number - 2)]
        proposal = method.propose(number, told, trials.points[len(told) :])
        point = landscape.space.point(proposal.configuration)
        assert point is not None
        trials.add(point)
        spent += trials.cost(number - 1, FRACTION)
    return trials


Means = dict[tuple[float, tuple[int, ...]], Sequence[float] | np.ndarray | None]
"""Posterior means of trials scored at a share, which several endings ask for."""


def winner(trials: Trials, ending: Ending, budget: float, surrogate: Surrogate, means: Means) -> int | None:
    """The trial that a budget ends with: the best of the finished ones; None where none of them is sound."""
    kept, spent = [], 0.0
    for trial in range(len(trials.points)):
        spent += trials.cost(trial, FRACTION)
        if spent > ending.early(budget) + 1e-9:
            break
        kept.append(trial)
    for share, count in zip((FRACTION, *ending.finish[:-1]), ending.counts(budget), strict=True):
        kept = _ranked(trials, kept, share, means if ending.by_mean(share) else None, surrogate)[:count]
    sound = [trial for trial in kept if math.isfinite(trials.final(trial))]
    return min(sound, key=trials.final) if sound else None


def _ranked(trials: Trials, kept: Sequence[int], share: float, means: Means | None, surrogate: Surrogate) -> list[int]:
    """Trials scored at a share that did not diverge, the most promising first, by score or by posterior mean."""
    told = [trials.observation(trial, share) for trial in kept]
    worth: Sequence[float | None] | np.ndarray | None = None
    if means is not None:
        at = share, tuple(sorted(kept))
        if at not in means:
            means[at] = surrogate.promotion_estimates([trials.observation(trial, share) for trial in at[1]])
        found = means[at]
        worth = None if found is None else [found[at[1].index(trial)] for trial in kept]
    worth = [one.score for one in told] if worth is None else worth
    order = sorted((worth[at], told[at].score, trial) for at, trial in enumerate(kept) if told[at].score is not None)
    return [trial for _, _, trial in order]


def cell(landscape: Landscape, proposer: str, seed: int) -> dict[str, dict[str, list[float]]]:
    """Scaled regrets at each budget, by ending and split, of one run of proposals."""
    longest = max(ending.early(budget) for ending in ENDINGS for budget in BUDGETS)
    trials = propose(landscape, proposer, seed, longest)
    surrogate, means = Surrogate(landscape.space, seed=seed, initial=INITIAL), {}
    regrets: dict[str, dict[str, list[float]]] = {}
    for ending in (*ENDINGS, *FURTHER.get(proposer, ())):
        found = [trials.regret(winner(trials, ending, budget, surrogate, means)) for budget in BUDGETS]
        regrets[ending.name] = {split: [round(one[split], 5) for one in found] for split in found[0]}
    return regrets
