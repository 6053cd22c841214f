"""From rung to rung: trials that have come to one are ranked there, the better ones go on, the others stop or stay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from jaxtune.search.ledger import Ledger
from jaxtune.search.loop import Phase, TrialLoop
from jaxtune.search.promotion import next_up, ranking
from jaxtune.search.scores import Scores
from jaxtune.search.settings import Settings
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import Trial, TrialState

Is = Callable[[TrialState], bool]


class Climb:
    """Takes a study's trials up its rungs: those of the ladder, the fraction, those of ``search.finish``, the end.

    That is successive halving (Jamieson & Talwalkar 2016) with the numbers of the study. The reference goes on at every
    rung, beside the others.

    Args:
      settings: of the study.
      ledger: opened.
      loop: trains the trials.
      scores: of the study's space.
      surrogate: weighs scores by their standard errors, where they are not compared as they are.
    """

    def __init__(self, settings: Settings, ledger: Ledger, loop: TrialLoop, scores: Scores, surrogate: Surrogate):
        self._settings, self._ledger, self._history = settings, ledger, ledger.history
        self._loop, self._scores = loop, scores
        self._surrogate = surrogate if settings.search.promote_by == "mean" else None

    def to_the_fraction(self) -> None:
        """Takes the better half of the trials that wait at each rung of the ladder to the next one; the others end.

        In a study that was extended, trials that went on before take their places in the half; what was decided of
        them stays.
        """
        for rung in range(len(self._settings.search.ladder)):
            step = functools.partial(self._rung_step, rung)
            order = list(ranking(self._scores.at(self._history.trials, step, self._history.lost), self._surrogate))
            half = math.ceil(len(order) / 2)

            def waits(state: TrialState, step: Callable[[Trial], int] = step) -> bool:
                return not state.ended and max(state.rungs, default=0) == step(state.trial)

            for state in (self._history.trials[number] for number in order[half:]):
                if waits(state):
                    self._loop.stop(state, step(state.trial))
            self._rise("early", order[:half], half, waits=waits)

    def to_the_end(self) -> None:
        """Takes the most promising trials to each share of ``search.finish``; the next in line replaces one that fails.

        At the fraction they are ranked as ``search.promote_by`` says, at a later rung by the scores themselves, of
        which there are too few to fit anything to.
        """
        for leg, wanted in enumerate(self._settings.promotions):
            self._finish(leg, wanted)

    def _finish(self, leg: int, wanted: int) -> None:
        trials, promoted = self._history.trials, self._history.promoted.setdefault(leg, [])
        step = functools.partial(self._finish_step, leg - 1) if leg else None
        seen = self._scores.at(trials, step, self._history.lost)
        worth = ranking(seen, None if leg else self._surrogate)
        order = [*promoted, *(number for number in worth if number not in promoted)]

        def promote(state: TrialState) -> TrialState:
            number = state.trial.id
            if number and number not in promoted:
                outcome = state.early if step is None else state.finishing[step(state.trial)]
                self._ledger.append(
                    "promoted",
                    trial=number,
                    configuration=state.trial.configuration,
                    rank=order.index(number) + 1,
                    score=None if outcome is None else outcome.score,
                    estimate=self._settings.goal.signed(worth[number]),
                    leg=leg,
                    until=self._finish_step(leg, state.trial),
                )
            return state

        def waits(state: TrialState) -> bool:
            return state.ranked and state.final is None and len(state.finishing) == leg

        self._rise("final", order, wanted, waits=waits, passed=lambda state: state.passed(leg), promote=promote)

    def _rise(
        self,
        phase: Phase,
        order: Sequence[int],
        wanted: int,
        *,
        waits: Is,
        passed: Is = lambda state: False,
        promote: Callable[[TrialState], TrialState] = lambda state: state,
    ) -> None:
        """Trains the reference and the first of an order that can go on, until so many have.

        Args:
          phase: what they train in.
          order: numbers, best first.
          wanted: how many of them.
          waits: whether a trial can go on.
          passed: whether it has gone on.
          promote: is told of each before it goes on.
        """

        def following(running: set[int]) -> Callable[[], TrialState] | None:
            state = next_up(self._history.trials, order, running, wanted, waits=waits, passed=passed)
            return None if state is None else functools.partial(promote, state)

        self._loop.train(phase, following)

    def _rung_step(self, rung: int, trial: Trial) -> int:
        return self._loop.milestones(trial).rungs[rung]

    def _finish_step(self, leg: int, trial: Trial) -> int:
        return self._loop.milestones(trial).legs[leg]
