"""Trials under way: each one's side of the training, and the slots of a population that they train in."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.config.metrics import METRICS, is_generated
from jaxtune.evaluation import EvaluatorResult
from jaxtune.search.outcome import Outcome
from jaxtune.search.trial import Trial
from jaxtune.telemetry.writers import JsonlWriter
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.fit import Asked, FitResult, Run, StepOutcome
from jaxtune.training.population import Population
from jaxtune.training.run_options import RunOptions
from jaxtune.training.state import TrainState
from jaxtune.training.trainer import Trainer


class RunningTrial:
    """A trial between its start and its score.

    Args:
      trial: whose files it continues from.
      trainer: its program.
      hyperparameters: its values, by dotted key.
      until: the step that it is scored at.
      seed: of its start and its dropout.
      batches: its own.
      objective: the name of a metric.
      metrics: the names of others that are measured beside it.
      answer: scores a trained state by generating answers, where the objective or another of the metrics is a task's;
        None where whoever drives the trial does, for several at once, and tells it (:meth:`tell`).
      options: its validation, how often it logs and saves, and who is told; the rest is the trial's own.

    Attributes:
      batch: what the next step takes; None while the trial waits to be told its score, and once it is scored.
      asked: the state that waits to be scored by its answers.
      seconds: its share of the time so far.
    """

    def __init__(
        self,
        trial: Trial,
        trainer: Trainer,
        hyperparameters: Mapping[str, float],
        *,
        until: int,
        seed: int,
        batches: Any,
        objective: str,
        metrics: Sequence[str] = (),
        answer: Callable[[TrainState], EvaluatorResult] | None = None,
        options: RunOptions,
    ):
        self.trial, self.trainer, self.values = trial, trainer, hyperparameters
        self.seconds = 0.0
        self.result: FitResult | None = None
        self.batch: Mapping[str, np.ndarray] | None = None
        self.asked: TrainState | None = None
        self._objective, self._batches, self._answer = objective, batches, answer
        self._errors: dict[str, float] = {}
        config = options.config or trainer.config
        self._checkpoints = Checkpoints(trial.files.checkpoints_path, keep=config.keep)
        self._writer = JsonlWriter(trial.files.metrics_path, self._checkpoints.latest_step or 0)
        own = {"hyperparameters": hyperparameters, "checkpoints": self._checkpoints, "writer": self._writer}
        asks = any(map(is_generated, (objective, *metrics)))
        run = Run(trainer, batches, dataclasses.replace(options, **own), asks=asks)
        # The trainer may have been made for a trial with another seed.
        self.state = run.start(trainer.init(hyperparameters, seed=seed))
        self._loop = run.loop(until)
        self._go(functools.partial(next, self._loop))

    def take(self, taken: StepOutcome) -> None:
        """Tells the trial what its step came to."""
        self.state = None
        self._go(functools.partial(self._loop.send, taken))

    def tell(self, result: EvaluatorResult) -> None:
        """Tells the trial the score that it has asked for."""
        self.asked = None
        self._errors = dict(result.standard_errors)
        self._go(functools.partial(self._loop.send, result.metrics))

    def _go(self, resume: Callable[[], Mapping[str, np.ndarray] | Asked]) -> None:
        self.batch = None
        try:
            wanted = resume()
        except StopIteration as end:
            self.result = end.value
            return
        if not isinstance(wanted, Asked):
            self.batch = wanted
        elif self._answer is None:
            self.asked = wanted.state
        else:
            self.tell(self._answer(wanted.state))

    @property
    def interrupted(self) -> bool:
        """Whether it ended because it was told to."""
        return self.result is not None and self.result.stopped == "signal"

    def close(self) -> None:
        """Closes its files; a trial that is not scored stays as its last checkpoint left it."""
        self._loop.close()
        self._writer.close()
        self._batches.close()
        self._checkpoints.close()

    def outcome(self) -> Outcome:
        """Its score."""
        assert self.result is not None
        result = self.result
        metrics = {**result.metrics, **result.evaluation}
        if result.stopped == "diverged":
            return Outcome(math.nan, None, result.step, self.seconds, metrics, diverged=True)
        logged = METRICS[self._objective].logged or self._objective
        score = result.evaluation[logged]
        error = self._errors.get(logged, result.evaluation.get(f"{logged}_standard_error"))
        return Outcome(score, error, result.step, self.seconds, metrics, diverged=not math.isfinite(score))


class Slots:
    """The trials of one program, in the slots of populations of one size.

    Where there are more trials than slots, another population takes them: how many trials a process has seen, or trains
    beside a trial, never decides which compiled step trains it. So a trial that is continued, wherever and beside
    whatever, ends with the same numbers to the last bit.

    Args:
      trainer: the program.
      size: slots of a population.
    """

    def __init__(self, trainer: Trainer, size: int):
        self.size = size
        self._populations = [Population(trainer, size)]
        # In each population, the trials by their slots.
        self._trials: list[dict[int, RunningTrial]] = [{}]

    @property
    def traces(self) -> int:
        """How often a step of this program was compiled."""
        return self._populations[0].traces

    def advance(self, running: list[RunningTrial]) -> None:
        """One step of every trial of the list, all in this program; those that were not there before get a slot."""
        self._trials = [{slot: trial for slot, trial in held.items() if trial in running} for held in self._trials]
        known = [trial for held in self._trials for trial in held.values()]
        for trial in running:
            if trial not in known:
                assert trial.state is not None, "a trial that has trained has its slot"
                index, slot = self._free_slot(trial.trial.id)
                self._populations[index].put(slot, trial.state, trial.values)
                self._trials[index][slot] = trial
        launched = []
        for population, held in zip(self._populations, self._trials, strict=True):
            batches = {slot: trial.batch for slot, trial in held.items() if trial.batch is not None}
            if batches:
                launched.append((population, held, population.step(batches)))
        for population, held, metrics in launched:
            for slot in sorted(metrics):
                # Evaluated, saved and returned, the state of a step is still copied out once.
                state = functools.cache(functools.partial(population.take, slot))
                held[slot].take((state, metrics[slot]))

    def _free_slot(self, number: int) -> tuple[int, int]:
        """A population and a free slot in it, which is that of the trial's number where it can be."""
        preferred = number % self.size
        for index, held in enumerate(self._trials):
            free = [slot for slot in range(self.size) if slot not in held]
            if free:
                return index, preferred if preferred in free else free[0]
        self._populations.append(self._populations[0].another())
        self._trials.append({})
        return len(self._trials) - 1, preferred
