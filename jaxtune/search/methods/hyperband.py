"""``hyperband``: proposals of ``tpe``, and trials stopped on the way to the fraction by Optuna's Hyperband pruner."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtune.search.methods.optuna_study import empty_study, reported_trials
from jaxtune.search.methods.tpe import TreeParzen

if TYPE_CHECKING:
    import optuna

# Of the trials at a rung, one in this many goes on (the factor of Li et al. 2018).
_REDUCTION = 3
# Rungs before the fraction.
_RUNGS = 2


class Hyperband(TreeParzen):
    """Successive halving at several strengths (Li et al. 2018), with the study's fraction as its full length.

    A trial belongs to one bracket, drawn from its number: the brackets differ in the rung at which they first stop
    trials, and one stops none. Proposals learn from the trials of all brackets, the stopped ones included.
    """

    name = "hyperband"

    def rungs(self, until: int) -> tuple[int, ...]:
        """A ninth and a third of ``until``, in whole steps; those of them that lie before it."""
        steps = (_first(until) * _REDUCTION**power for power in range(_RUNGS))
        return tuple(step for step in steps if step < until)

    def stops(self, trial: int, until: int, reports: Mapping[int, Mapping[int, float]]) -> bool:
        """Whether the pruner ends ``trial``, which is not among the best third at its rung."""
        from optuna.pruners import HyperbandPruner

        first = _first(until)
        # Optuna counts brackets by the powers that lie between the two, which whole steps would make depend on how the
        # first rung was rounded: as many as there are rungs are meant, and the one that stops none.
        most = first * _REDUCTION ** len(self.rungs(until))
        pruner = HyperbandPruner(min_resource=first, max_resource=most, reduction_factor=_REDUCTION)
        study = empty_study()
        study.add_trials(reported_trials(reports))
        # The pruner notes a trial's score at a rung when it is asked about the trial there, so it is asked about every
        # report again; what it says of the others was decided when they were reported.
        for other in [number for number in reports if number != trial]:
            for step in sorted(reports[other]):
                _decide(pruner, study, other, step)
        return [_decide(pruner, study, trial, step) for step in sorted(reports[trial])][-1]


def _first(until: int) -> int:
    """The first rung."""
    return math.ceil(until / _REDUCTION**_RUNGS)


def _decide(pruner: optuna.pruners.HyperbandPruner, study: optuna.study.Study, number: int, step: int) -> bool:
    """The pruner's answer for a trial as it was at ``step``."""
    trial = copy.copy(study.get_trials(deepcopy=False)[number])
    trial.intermediate_values = {at: score for at, score in trial.intermediate_values.items() if at <= step}
    return pruner.prune(study, trial)
