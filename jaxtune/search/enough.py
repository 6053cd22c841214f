"""When a study has tried enough: its budget is spent, or the next trial promises less than noise would show.

Either ends the proposals alone: what is under way goes on, and the best trials are finished. That they can be is what a
budget counts: the steps that were run, those of trials under way to the fraction, and those that finishing still owes.
A decision about trial n knows what the proposal of trial n knows, so that a study that was killed repeats it; only
seconds are as long as they were, so that the journal has every decision to end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.durations import recorded_work
from jaxtune.search.milestones import Milestones, Shares
from jaxtune.search.proposals import Request
from jaxtune.search.repeats import FINALISTS
from jaxtune.search.runner import CountsFlops, TrialRunner
from jaxtune.search.settings import Settings
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import History, Trial, TrialState

# Scores without which a surrogate's gain is a guess, and how many trials in a row have to promise less than noise.
_FEWEST_SCORES, _IN_A_ROW = 10, 2


def why_enough(record: Mapping[str, Any]) -> str:
    """Why a study proposes no further trial, in words.

    Args:
      record: of its journal (``enough``).
    """
    if record["reason"] == "budget":
        needed, limit = (f"{float(record[name]):,.6g}" for name in ("with_another", "limit"))
        return f"with another one the study would take {needed} {record['budget']}, finishing included, of {limit}"
    return f"it would gain {record['gain']:.2g} at most, and noise is {record['noise']:.2g}"


@dataclass(frozen=True)
class Budget:
    """What a study with so many trials costs, finishing included.

    Attributes:
      search: its settings.
      milestones: the steps at which a trial is looked at.
      flops: model FLOPs of one of a trial's steps; None where nobody counts them.
    """

    search: SearchConfig
    milestones: Callable[[Trial], Milestones]
    flops: Callable[[Trial], float] | None = None

    @classmethod
    def of(cls, settings: Settings, runner: TrialRunner) -> Budget:
        """Of a study that has begun or is to begin, over a runner."""
        counted = runner.step_flops if isinstance(runner, CountsFlops) else None
        return cls(settings.search, lambda trial: settings.milestones(runner.total_steps(trial)), counted)

    def trials(self, reference: Trial) -> int | None:
        """How many trials it pays for, if each costs what the reference does, ``search.trials`` at most.

        Returns:
          None where there is no budget, or one of seconds alone: nobody knows beforehand how long a step takes.
        """
        given = {} if self.search.budget is None else self.search.budget.model_dump(exclude_none=True)
        limits = {name: limit for name, limit in given.items() if name != "seconds"}
        if not limits:
            return None
        history = History({0: TrialState(reference)})
        for count in range(1, self.search.trials):
            cost = self.spent(history, (), count + 1)
            if any(cost[name] > limit for name, limit in limits.items()):
                return count
        return self.search.trials

    def check(self, reference: Trial) -> None:
        """Refuses a budget that does not pay for the reference.

        Raises:
          UserError: it does not, or it is in FLOPs, which nobody counts.
        """
        budget = self.search.budget
        if budget is None:
            return
        if budget.flops is not None and self.flops is None:
            raise UserError("search.budget.flops: nobody counts the FLOPs of these trials; give steps or seconds")
        for name, cost in self.spent(History({0: TrialState(reference)}), (), 1).items():
            given = getattr(budget, name)
            if given is not None and given < cost:
                raise UserError(
                    f"search.budget.{name}: {given:g} is less than the {cost:g} of one trial, the reference, which is "
                    f"finished in any case; give at least as many, or shorten train.steps"
                )

    def spent(self, history: History, before: Collection[int], count: int) -> dict[str, float]:
        """What a study will have cost once ``count`` trials are scored and the best of them finished.

        Args:
          history: of the trials so far.
          before: numbers of those whose outcome may be known.
          count: with those that are yet to be proposed, which cost what the reference does.

        Returns:
          ``steps``, and ``flops`` and ``seconds`` where they can be told.
        """
        states = [history.trials[number] for number in sorted(history.trials)]
        one = states[0].trial if states else Trial(0, {}, Path())
        early = {state.trial.id: self._early(state, state.trial.id in before) for state in states}
        later = (count - len(states)) * self._first(one) + self._climbs(one, count)
        # Those that were finished before the study was extended may be among the best again, or not.
        later += self._ends(one, count, sum(state.final is not None for state in states[1:]))
        found = {"steps": float(sum(early.values()) + later)}
        if self.flops is not None:
            known = sum(early[state.trial.id] * self.flops(state.trial) for state in states)
            found["flops"] = known + later * self.flops(one)
        run = sum(max((outcome.steps_run for outcome in state.outcomes), default=0) for state in states)
        if run:
            work = recorded_work(history)
            found["seconds"] = work + max(0.0, found["steps"] - run) * work / run
        return found

    def _first(self, trial: Trial) -> int:
        """Steps to where every trial comes."""
        stops = self.milestones(trial)
        return (*stops.rungs, stops.early)[0]

    def _early(self, state: TrialState, known: bool) -> int:
        """Steps of a trial before it is finished; on a ladder those of its first rung."""
        expected = self._first(state.trial)
        if not (known and state.ended and state.outcomes):
            return expected
        # One that diverged, or that the method stopped, took fewer.
        return min(expected, max(outcome.steps_run for outcome in state.outcomes))

    def _ends(self, trial: Trial, count: int, finished: int) -> int:
        """Steps from the fraction on: of the reference, of those that go on at each rung, of repeats of the best."""
        stops, steps, others = self.milestones(trial), 0, 0
        numbers = Shares.of(self.search.model_dump()).promotions(self.search.promote)
        for number, (low, high) in zip(numbers, itertools.pairwise((stops.early, *stops.legs)), strict=True):
            others = min(finished + number, count - 1)
            steps += (1 + others) * (high - low)
        return steps + (self.search.seeds - 1) * min(FINALISTS, 1 + others) * stops.total

    def _climbs(self, trial: Trial, count: int) -> int:
        """Steps of a ladder beyond its first rung: the reference and the better half of the others go on at each."""
        stops, steps, climbing = self.milestones(trial), 0, count
        for low, high in itertools.pairwise((*stops.rungs, stops.early)):
            climbing = 1 + math.ceil((climbing - 1) / 2)
            steps += climbing * (high - low)
        return steps


class Enough:
    """Decides whether a study proposes another trial.

    Args:
      budget: what trials cost.
      surrogate: what scores say of the next one.
    """

    def __init__(self, budget: Budget, surrogate: Surrogate):
        self._budget, self._surrogate = budget, surrogate
        self._search = budget.search
        self._gains: dict[int, tuple[float, float] | None] = {}

    def reason(
        self, history: History, before: Collection[int], request: Callable[[int], Request]
    ) -> dict[str, Any] | None:
        """Why the next trial is not to be proposed, as fields of a journal record; None if it is.

        Args:
          history: of the trials so far, the reference among them.
          before: numbers of the trials whose scores the proposal of the next one knows.
          request: what the proposal of a trial knows, by its number.
        """
        count = len(history.trials)
        if (given := self._search.budget) is not None:
            cost = self._budget.spent(history, before, count + 1)
            for name, limit in given.model_dump(exclude_none=True).items():
                if cost.get(name, 0.0) > limit:
                    return {"reason": "budget", "budget": name, "limit": limit, "with_another": cost[name]}
        if self._search.terminate == "gain" and count > _IN_A_ROW:
            last = [self._gain(request(number)) for number in range(count, count - _IN_A_ROW, -1)]
            found = [pair for pair in last if pair is not None]
            if len(found) == _IN_A_ROW and all(gain < noise for gain, noise in found):
                return {"reason": "terminator", "gain": found[0][0], "noise": found[0][1]}
        return None

    def _gain(self, request: Request) -> tuple[float, float] | None:
        number, told = request.trial, [seen for _, seen in request.told]
        if number not in self._gains:
            enough = sum(one.score is not None for one in told) >= max(_FEWEST_SCORES, self._surrogate.initial)
            pending = [point for _, point in request.pending]
            self._gains[number] = self._surrogate.gain(number, told, pending) if enough else None
        return self._gains[number]
