"""Scores of trials under way that are scored by their answers: those of one program side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtune.evaluation import Evaluator
from jaxtune.search.slots import RunningTrial
from jaxtune.training.stacked_adapters import StackedAdapters
from jaxtune.training.trainer import Trainer


class Scoring:
    """Answers for trials that wait for their score (:attr:`RunningTrial.asked`).

    A program's slots bound how many are answered at once. How many wait decides no compiled program, so a trial's
    answers are the same whatever trains beside it.

    Args:
      evaluator: of the validation split; None where no task is scored, and then no trial asks.
      slots_of: how many trials of a program train in one compiled step.
    """

    def __init__(self, evaluator: Evaluator | None, slots_of: Callable[[Trainer], int]):
        self._evaluator, self._slots_of = evaluator, slots_of
        self._stacks: dict[Trainer, StackedAdapters] = {}

    def score(self, running: Sequence[RunningTrial]) -> bool:
        """Tells those that wait their scores; whether there were any."""
        programs: dict[Trainer, list[RunningTrial]] = {}
        for trial in running:
            if trial.asked is not None:
                programs.setdefault(trial.trainer, []).append(trial)
        for trainer, waiting in programs.items():
            if trainer not in self._stacks:
                self._stacks[trainer] = StackedAdapters(trainer, self._slots_of(trainer))
            size = self._stacks[trainer].size
            for first in range(0, len(waiting), size):
                self._tell(self._stacks[trainer], waiting[first : first + size])
        return bool(programs)

    def _tell(self, stack: StackedAdapters, waiting: Sequence[RunningTrial]) -> None:
        assert self._evaluator is not None, "trials ask for scores of a task alone"
        runs = [(trial.asked, trial.values) for trial in waiting if trial.asked is not None]
        results = self._evaluator.evaluate_side_by_side(waiting[0].trainer.params, stack(runs), len(runs))
        for trial, result in zip(waiting, results, strict=True):
            trial.tell(result)
