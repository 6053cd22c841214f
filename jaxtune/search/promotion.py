"""Which trials are finished: the reference, and those whose early score promises most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxtune.search.observation import Observation
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import TrialState


def ranking(seen: Sequence[tuple[int, Observation]], surrogate: Surrogate | None) -> dict[int, float]:
    """Trials that may be promoted with what each is worth (lower is better), best first.

    Trials that satisfy the bounds of ``search.where`` come before those that do not, which follow by how much they
    violate them. Worth is the surrogate's posterior mean given each score's standard error, or the score itself where
    there are too few to fit a surrogate. A diverged trial is not among them, nor the reference, which is finished
    anyway.

    Args:
      seen: observations by trial number, all of one step.
      surrogate: of the study's space; None to rank by the scores themselves.
    """
    observations = [observation for _, observation in seen]
    estimates = None if surrogate is None else surrogate.promotion_estimates(observations)
    ranked = []
    for index, (number, observation) in enumerate(seen):
        if number == 0 or observation.score is None:
            continue
        worth = observation.score if estimates is None else float(estimates[index])
        ranked.append((observation.bounds, worth, observation.score, number))
    return {number: worth for _, worth, _, number in sorted(ranked)}


def next_up(
    trials: Mapping[int, TrialState],
    order: Sequence[int],
    running: set[int],
    wanted: int,
    *,
    waits: Callable[[TrialState], bool],
    passed: Callable[[TrialState], bool],
) -> TrialState | None:
    """The reference, then the best trials until enough of them have gone on or are on the way; None then.

    Args:
      trials: all trials by number.
      order: numbers of those that may go on, best first.
      running: numbers of those that are on the way.
      wanted: how many of the order are to come there.
      waits: whether a trial can go on.
      passed: whether it has come there.
    """
    if waits(trials[0]) and 0 not in running:
        return trials[0]
    promising = 0
    for state in (trials[number] for number in order):
        if promising == wanted:
            return None
        if passed(state) or state.trial.id in running:
            promising += 1
        elif waits(state):
            return state
    return None
