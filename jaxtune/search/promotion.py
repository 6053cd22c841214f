"""Which trials are finished: the reference, and those whose early score promises most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtune.search.observation import Observation
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import TrialState


def ranking(seen: Sequence[tuple[int, Observation]], surrogate: Surrogate) -> dict[int, float]:
    """Trials that may be promoted with what each is worth (lower is better), best first.

    Worth is the surrogate's posterior mean given each score's standard error, or the score itself where there are too
    few to fit a surrogate. A diverged trial is not among them, nor the reference, which is finished anyway.

    Args:
      seen: observations by trial number, all of one step.
      surrogate: of the study's space.
    """
    estimates = surrogate.promotion_estimates([observation for _, observation in seen])
    ranked = []
    for index, (number, observation) in enumerate(seen):
        if number == 0 or observation.score is None:
            continue
        worth = observation.score if estimates is None else float(estimates[index])
        ranked.append((worth, observation.score, number))
    return {number: worth for worth, _, number in sorted(ranked)}


def next_to_finish(
    trials: Mapping[int, TrialState], order: Sequence[int], running: set[int], promote: int
) -> TrialState | None:
    """The reference, then the best trials until enough of them are finished or on the way; None then.

    Args:
      trials: all trials by number.
      order: numbers of those that may be promoted, best first.
      running: numbers of those that are being finished.
      promote: how many of the order are wanted.
    """
    if trials[0].ranked and trials[0].final is None and 0 not in running:
        return trials[0]
    promising = 0
    for state in (trials[number] for number in order):
        if promising == promote:
            return None
        if state.finished or state.trial.id in running:
            promising += 1
        elif state.ranked and state.final is None:
            return state
    return None
