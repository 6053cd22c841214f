"""The scores of a study's trials as the surrogate takes them: lower is better, at their points of the space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jaxtune.search.observation import Observation
from jaxtune.search.outcome import Outcome
from jaxtune.search.space import Point, Space
from jaxtune.search.trial import Trial, TrialState

Trials = Mapping[int, TrialState]


@dataclasses.dataclass(frozen=True)
class Scores:
    """From outcomes to observations.

    Attributes:
      space: the searched space.
      reference: the point of trial 0; None where it lies outside the space, and is not told.
      sign: -1 for an objective that is maximised.
    """

    space: Space
    reference: Point | None
    sign: float

    def point(self, state: TrialState) -> Point | None:
        """Where a trial lies."""
        return self.reference if state.trial.id == 0 else self.space.point(state.trial.configuration)

    def observation(self, state: TrialState, outcome: Outcome, stopped: int | None = None) -> Observation | None:
        """One outcome of a trial; None for a reference outside the space."""
        point = self.point(state)
        if point is None:
            return None
        score = None if outcome.failed else self.sign * outcome.score
        return Observation(point, score, outcome.standard_error, stopped)

    def last(self, trials: Trials) -> list[tuple[int, Observation]]:
        """By trial number the early score; of a trial that was stopped the last one it had, marked as stopped."""
        seen = []
        for number in sorted(trials):
            state = trials[number]
            outcome = state.outcomes[-1] if state.stopped else state.early
            if outcome is not None:
                seen.append((number, self.observation(state, outcome, max(state.rungs) if state.stopped else None)))
        return [(number, one) for number, one in seen if one is not None]

    def first(self, trials: Trials, rung: Callable[[Trial], int] | None) -> list[tuple[int, Observation]]:
        """What proposals learn from: scores that were all taken at the same share of the steps.

        Args:
          trials: by number.
          rung: the step of a trial's first rung on the ladder; None without one, and then these are the last scores.
        """
        if rung is None:
            return self.last(trials)
        seen = []
        for number in sorted(trials):
            state = trials[number]
            # One that diverged before the rung has that to tell.
            outcome = state.rungs.get(rung(state.trial)) or state.early
            if outcome is not None:
                seen.append((number, self.observation(state, outcome)))
        return [(number, one) for number, one in seen if one is not None]
