"""The scores of a study's trials as the surrogate takes them: lower is better, at their points of the space.

What ranks, promotes or explains compares scores of one step alone: those of a rung, or those of the fraction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from jaxtune.search.objectives import Objectives
from jaxtune.search.observation import Observation
from jaxtune.search.outcome import Outcome
from jaxtune.search.space import Point, Space
from jaxtune.search.trial import History, Trial, TrialState

Trials = Mapping[int, TrialState]


@dataclasses.dataclass(frozen=True)
class Scores:
    """From outcomes to observations.

    Attributes:
      space: the searched space.
      reference: the point of trial 0; None where it lies outside the space, and is not told.
      sign: -1 for an objective that is maximised.
      objectives: all of them, with the bounds; None where there is one without bounds.
    """

    space: Space
    reference: Point | None
    sign: float
    objectives: Objectives | None = None

    def point(self, state: TrialState) -> Point | None:
        """Where a trial lies."""
        return self.reference if state.trial.id == 0 else self.space.point(state.trial.configuration)

    def at(
        self, trials: Trials, rung: Callable[[Trial], int] | None = None, lost: Collection[int] = ()
    ) -> list[tuple[int, Observation]]:
        """What trials came to at one share of their steps, by number.

        One that was stopped before has nothing to say of it; one that diverged before has just that.

        Args:
          trials: by number.
          rung: the step of a trial's rung, before the fraction or after; None for the fraction.
          lost: trials that count as diverged whatever their score was there, as it is known how they went on.
        """
        seen = []
        for number in sorted(trials):
            state = trials[number]
            outcome = state.early if rung is None else state.at(rung(state.trial))
            if outcome is None and state.early is not None and state.early.failed:
                outcome = state.early
            if outcome is not None:
                seen.append((number, self._observation(state, outcome, diverged=number in lost)))
        return [(number, one) for number, one in seen if one is not None]

    def told(self, trials: Trials, rung: Callable[[Trial], int] | None) -> list[tuple[int, Observation]]:
        """What proposals learn from, by number: scores of one step, and trials that a method stopped before it.

        Args:
          trials: by number.
          rung: the step of a trial's first rung on the ladder, which all trials reach; None without a ladder.
        """
        seen = self.at(trials, rung, [number for number, state in trials.items() if state.failed])
        for number, state in trials.items() if rung is None else ():
            if state.stopped:
                last = self._observation(state, state.rungs[max(state.rungs)], stopped=len(state.rungs))
                seen += [] if last is None else [(number, last)]
        return sorted(seen, key=lambda pair: pair[0])

    def reports(
        self, history: History, trial: Trial, rungs: Callable[[Trial], Sequence[int]]
    ) -> dict[int, dict[int, float]]:
        """What a method is told that has to say whether a trial is stopped: scores by trial and rung, up to its last.

        What came later is left out: a study that was killed asks again, and gets the same answer.

        Args:
          history: of the study.
          trial: which has been scored at a rung.
          rungs: the steps of a trial's rungs. Trials of other lengths are compared at the same rung, and told at the
            step that it is of ``trial``.
        """
        last = max(place for place, (number, _) in enumerate(history.reports) if number == trial.id)
        told: dict[int, dict[int, float]] = {}
        for number, step in history.reports[: last + 1]:
            state = history.trials[number]
            places = dict(zip(rungs(state.trial), rungs(trial), strict=False))
            told.setdefault(number, {})[places.get(step, step)] = self.sign * state.rungs[step].score
        return told

    def _observation(
        self, state: TrialState, outcome: Outcome, *, diverged: bool = False, stopped: int | None = None
    ) -> Observation | None:
        """One outcome of a trial; None for a reference outside the space."""
        point = self.point(state)
        if point is None:
            return None
        score = None if diverged or outcome.failed else self.sign * outcome.score
        observation = Observation(point, score, outcome.standard_error, stopped)
        if self.objectives is None:
            return observation
        values = self.objectives.values(state, outcome)
        signed = zip(self.objectives.names, self.objectives.goals(), strict=True)
        return dataclasses.replace(
            observation,
            objectives=tuple(None if (value := values[name]) is None else goal.signed(value) for name, goal in signed),
            violation=self.objectives.violation(state, outcome, counted=False),
            bounds=self.objectives.violation(state, outcome),
        )
