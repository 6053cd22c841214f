"""Which trial of a study is ahead, whoever asks."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtune.search.objectives import Objectives
from jaxtune.search.outcome import Outcome
from jaxtune.search.trial import History, TrialState


def leader(history: History, objectives: Objectives, *, ended: bool) -> TrialState | None:
    """The trial that is ahead; None while none has a score.

    At the end that is the one with the best final score, or of those that were repeated with other seeds the one with
    the best mean: a score that nobody repeated may be luck. Until then the best of those that are finished is compared
    with the best of the others at the step that both have passed, the fraction: beside their early scores its final one
    would let the reference lead, which is finished first.

    Args:
      history: of the study.
      objectives: of the study: the first decides among the trials that satisfy the bounds, and where none does, the
        least violation.
      ended: whether all are finished that are to be.
    """

    def best(trials: Iterable[tuple[TrialState, Outcome | None]]) -> TrialState | None:
        scores = [
            (objectives.violation(state, outcome), objectives.goal.signed(outcome.score), state.trial.id)
            for state, outcome in trials
            if outcome is not None
        ]
        return history.trials[min(scores)[2]] if scores else None

    sound = [state for state in history.trials.values() if not state.failed]
    finished = best((state, state.final) for state in sound)
    if ended:
        means = [
            (objectives.violation(state, state.final), objectives.goal.signed(state.mean), state.trial.id)
            for state in sound
            if state.repeats and state.mean is not None
        ]
        return history.trials[min(means)[2]] if means else finished
    others = best((state, state.early) for state in sound if state.final is None)
    if finished is None or others is None:
        return finished or others
    return best((state, state.early or state.final) for state in (finished, others))
