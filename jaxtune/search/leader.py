"""Which trial of a study is ahead, whoever asks."""

from __future__ import annotations

from jaxtune.search.trial import History, TrialState


def leader(history: History, direction: str, *, ended: bool) -> TrialState | None:
    """The trial that is ahead; None while none has a score.

    At the end that is the one with the best final score. Until then every trial counts with its latest score, the final
    one or else the one at the fraction: of final scores alone the reference, finished first, would lead until the next
    one is.

    Args:
      history: of the study.
      direction: ``min`` or ``max``.
      ended: whether all are finished that are to be.
    """
    sign = 1.0 if direction == "min" else -1.0
    latest = {}
    for number, state in history.trials.items():
        outcome = state.final if ended else state.final or state.early
        if outcome is not None and not state.failed:
            latest[number] = sign * outcome.score
    if not latest:
        return None
    return history.trials[min(latest, key=lambda number: (latest[number], number))]
