"""The training loop: steps, evaluations, checkpoints, early stopping, resuming.

The loop of one run (:class:`Run`) does not call the step itself: it asks for one by yielding a batch and is told the
outcome. So :func:`fit` drives a run by itself, and a population drives many of them through one compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from jaxtune.config.schema import TrainConfig
from jaxtune.evaluation.loss import LossResult
from jaxtune.telemetry.tables import html_table
from jaxtune.telemetry.throughput import Throughput, Window
from jaxtune.telemetry.writers import CutBack, MetricWriter
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.save_schedule import SaveSchedule, Why, tell_going_on
from jaxtune.training.state import TrainState


@runtime_checkable
class Steps(Protocol):
    """What the loop needs of a trainer."""

    config: TrainConfig
    hyperparameters: dict[str, float]

    def init(self, hyperparameters: Mapping[str, float] | None = None) -> TrainState:
        """A fresh state."""
        ...

    def step(
        self, state: TrainState, batch: Mapping[str, Any], hyperparameters: Mapping[str, float] | None = None
    ) -> tuple[TrainState, Mapping[str, Any]]:
        """One optimizer step."""
        ...

    def evaluate(
        self, state: TrainState, batches: Any, hyperparameters: Mapping[str, float] | None = None
    ) -> LossResult:
        """The loss over batches."""
        ...

    def throughput(self, hyperparameters: Mapping[str, float] | None = None) -> Throughput:
        """A counter that knows the FLOPs of a step and the devices' peak."""
        ...


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of global host batches whose position can be saved."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch, JSON-able."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...


@runtime_checkable
class Listener(Protocol):
    """Is told what the loop does: a progress display."""

    def on_start(self, step: int, total: int) -> None:
        """The loop starts at ``step`` and ends at ``total``."""
        ...

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step were logged."""
        ...

    def on_end(self) -> None:
        """The loop is over."""
        ...


Stopped = Literal["finished", "paused", "patience", "signal", "diverged"]
Evaluate = Callable[[TrainState], Mapping[str, float]]
Taken = tuple[Callable[[], TrainState], Mapping[str, Any]]
"""What a step came to: the state after it, made when it is asked for, and its metrics, on the device or not."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a call of :func:`fit` ended.

    Attributes:
      state: after the last step.
      step: optimizer steps done in all.
      steps_run: of them in this call.
      stopped: ``finished`` (end of the schedule), ``paused`` (at ``until``), ``patience`` (no improvement), ``signal``
        or ``diverged`` (a loss was not finite).
      metrics: the last training metrics.
      evaluation: the last evaluation, or empty.
      examples: examples seen in this call; one cut over several rows counts in each.
      seconds: wall-clock time of this call.
    """

    state: TrainState
    step: int
    steps_run: int
    stopped: Stopped
    metrics: Mapping[str, float]
    evaluation: Mapping[str, float]
    examples: int
    seconds: float

    def _repr_html_(self) -> str:
        row = {"step": self.step, "stopped": self.stopped, **self.metrics, **self.evaluation, "seconds": self.seconds}
        return html_table([row], title="fit")


def fit(
    trainer: Steps,
    batches: Batches,
    *,
    state: TrainState | None = None,
    hyperparameters: Mapping[str, float] | None = None,
    until: int | None = None,
    validation: Sequence[Mapping[str, np.ndarray]] | None = None,
    evaluate: Evaluate | None = None,
    checkpoints: Checkpoints | None = None,
    writer: MetricWriter | None = None,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    evaluate_at_end: bool = True,
) -> FitResult:
    """Trains from a state, or from the newest checkpoint that can be read, up to a step.

    Args:
      trainer: what a step is.
      batches: endless; its position is part of every checkpoint.
      state: where to start if there is no checkpoint; a fresh one if None.
      hyperparameters: overrides of single values by dotted key.
      until: stop after this many steps in all; the schedule stays planned for ``train.steps``.
      validation: batches whose loss is the ``validation_loss`` of an evaluation.
      evaluate: further metrics of an evaluation; a ``validation_loss`` among them replaces that of ``validation``.
      checkpoints: where to resume from and write to.
      writer: takes the metrics of every logged step.
      listener: is told the same, for people.
      should_stop: asked after every step; when true the loop saves a checkpoint and returns.
      evaluate_at_end: evaluate after the last step as well.
    """
    run = Run(
        trainer,
        batches,
        hyperparameters=hyperparameters,
        validation=validation,
        evaluate=evaluate,
        checkpoints=checkpoints,
        writer=writer,
        listener=listener,
        should_stop=should_stop,
    )
    state = run.start(state)
    loop = run.loop(until, evaluate_at_end)
    try:
        batch = next(loop)
        while True:
            state, metrics = trainer.step(state, batch, run.values)
            batch = loop.send((functools.partial(_same, state), metrics))
    except StopIteration as end:
        return end.value


class Run:
    """One run's side of the training: its batches, metrics, evaluations, checkpoints and early stopping.

    Args:
      trainer: what a step is.
      batches: endless; its position is part of every checkpoint.
      hyperparameters: overrides of single values by dotted key.
      validation: see :func:`fit`, as the others.
      evaluate: further metrics of an evaluation.
      checkpoints: where to resume from and write to.
      writer: takes the metrics of every logged step.
      listener: is told the same, for people.
      should_stop: asked after every step.
      config: how often to log, evaluate and save, and the patience; the trainer's, if None. One trainer may serve runs
        that differ in it.

    Attributes:
      values: the hyperparameters that differ from the trainer's.
    """

    def __init__(
        self,
        trainer: Steps,
        batches: Batches,
        *,
        hyperparameters: Mapping[str, float] | None = None,
        validation: Sequence[Mapping[str, np.ndarray]] | None = None,
        evaluate: Evaluate | None = None,
        checkpoints: Checkpoints | None = None,
        writer: MetricWriter | None = None,
        listener: Listener | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        config: TrainConfig | None = None,
    ):
        self.trainer, self.batches, self.values = trainer, batches, dict(hyperparameters or {})
        self.validation, self.further = validation, evaluate
        self.checkpoints, self.writer, self.listener, self.should_stop = checkpoints, writer, listener, should_stop
        self.config = trainer.config if config is None else config
        self.total = int(self.values.get("train.steps", trainer.hyperparameters["train.steps"]))
        # What early stopping remembers; saved with every checkpoint.
        self.best, self.misses = math.inf, 0
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.pending: tuple[int, Any, Window] | None = None
        self.record: tuple[int, Mapping[str, float]] | None = None
        self.throughput = trainer.throughput(self.values)
        self.examples = 0
        self.diverged = False
        self.saves = SaveSchedule(self.config)
        self._state: Callable[[], TrainState] | None = None
        self._first = 0

    def start(self, state: TrainState | None = None) -> TrainState:
        """The state to begin with: of the newest checkpoint, or else the one given, or a fresh one."""
        begun, self._first = self._start(state)
        self._state = functools.partial(_same, begun)
        return begun

    def loop(
        self, until: int | None = None, evaluate_at_end: bool = True
    ) -> Generator[Mapping[str, np.ndarray], Taken, FitResult]:
        """Yields the batch of each step, is sent what the step came to, and returns how it ended.

        Args:
          until: stop after this many steps in all.
          evaluate_at_end: evaluate after the last step as well.
        """
        try:
            return (yield from self._loop(until, evaluate_at_end))
        finally:
            if self.listener:
                self.listener.on_end()

    def _loop(self, until: int | None, evaluate_at_end: bool) -> Generator[Mapping[str, np.ndarray], Taken, FitResult]:
        assert self._state is not None, "start() comes first"
        begin = time.perf_counter()
        start, state, self._state = self._first, self._state, None
        last = self.total if until is None else min(until, self.total)
        if self.listener:
            self.listener.on_start(start, last)
        # A run that was killed after it had run out of patience has nothing left to train.
        step, stopped = start, self._out_of_patience()
        self.saves.restart(start)
        self.throughput.resume()
        while step < last and stopped is None:
            batch = next(self.batches)
            state, metrics = yield batch
            step += 1
            self.throughput.count(int(np.count_nonzero(batch["segment_ids"])))
            self.examples += int(sum(len(np.unique(row[row >= 0])) for row in batch["example_ids"]))
            # The metrics of an earlier step are read while this one runs: the device never waits for the host.
            self._flush()
            if step % self.config.log_every == 0 or step == last:
                self.pending = (step, metrics, self.throughput.close())
            evaluated = self._due(step, self.config.evaluate_every) and step < last
            if evaluated:
                stopped = self._evaluate(state(), step)
            # At the last step there is nothing to stop any more: the end is evaluated and saved as ever.
            if stopped is None and step < last and self.should_stop():
                stopped = "signal"
            why: Why | None = None
            if step < last:
                why = "stop" if stopped is not None else self.saves.why(step, evaluated=evaluated)
            # Logged or not, the step is read before its state may take the place of the last good checkpoint.
            if why is not None and not _finite(metrics):
                self.diverged = True
            if self.diverged:
                stopped = "diverged"
            elif why is not None:
                self._save(state(), step, why, scored=evaluated)
        self._read()
        if self.diverged:
            stopped = "diverged"
        if stopped is None:
            # Resumed behind the last step, the evaluation stands in the checkpoint and in the metrics already.
            known = step == start and self.evaluation
            scored = evaluate_at_end and not known and (self.validation is not None or self.further is not None)
            if scored:
                # Where a run pauses is no part of it: gone on, it ends as if it had not paused.
                self._evaluate(state(), step, counts=self._due(step, self.config.evaluate_every))
            if step > start:
                self._save(state(), step, "end", scored=scored)
            stopped = "finished" if step >= self.total else "paused"
        self._flush()
        if self.checkpoints:
            self.checkpoints.wait()
        return FitResult(
            state=state(),
            step=step,
            steps_run=step - start,
            stopped=stopped,
            metrics=self.metrics,
            evaluation=self.evaluation,
            examples=self.examples,
            seconds=time.perf_counter() - begin,
        )

    def _start(self, state: TrainState | None) -> tuple[TrainState, int]:
        latest = self.checkpoints.latest_step if self.checkpoints else None
        state = self.trainer.init(self.values) if state is None else state
        if self.checkpoints is None or (found := self.checkpoints.resume(state)) is None:
            return state, int(state.step)
        step, restored, loop = found
        if step != latest and isinstance(self.writer, CutBack):
            self.writer.cut_back(step)
        self.batches.set_state(loop["data"])
        self.best, self.misses = loop["best"] if loop["best"] is not None else math.inf, loop["misses"]
        self.evaluation = loop["evaluation"]
        tell_going_on(step, self.total, self.checkpoints.directory, loop.get("why"))
        return restored, step

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and step % every == 0

    def _flush(self) -> None:
        """Writes the record of a logged step."""
        self._read()
        if self.record and self.writer:
            self.writer.write(*self.record)
        self.record = None

    def _read(self) -> None:
        """Waits for the metrics of a logged step and tells the listener; they begin the step's record."""
        if self.pending is None:
            return
        step, arrays, window = self.pending
        self.pending = None
        self.metrics = {name: float(value) for name, value in jax.device_get(dict(arrays)).items()}
        self.metrics |= self.throughput.rates(window)
        self.diverged = self.diverged or not _finite(self.metrics)
        self.record = (step, self.metrics)
        self._tell(step, self.metrics)

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.listener:
            self.listener.on_metrics(step, metrics)

    def _evaluate(self, state: TrainState, step: int, *, counts: bool = True) -> Stopped | None:
        """Evaluates and, where it counts for early stopping, tells that; a reason to stop, or None."""
        self._read()
        jax.block_until_ready(state.step)
        self.throughput.pause()
        evaluation: dict[str, float] = {}
        if self.validation is not None:
            result = self.trainer.evaluate(state, self.validation, self.values)
            evaluation = {"validation_loss": result.loss, "validation_tokens": result.tokens}
            if result.standard_error is not None:
                evaluation["validation_loss_standard_error"] = result.standard_error
        if self.further is not None:
            evaluation |= self.further(state)
        self.evaluation = evaluation
        # One record for a step that is logged and evaluated.
        self.record = (step, {**(self.record[1] if self.record else {}), **evaluation})
        self._flush()
        self._tell(step, evaluation)
        self.throughput.resume()
        score = evaluation.get("validation_loss")
        if score is None or not counts:
            return None
        if score < self.best:
            self.best, self.misses = score, 0
            return None
        self.misses += 1
        return self._out_of_patience()

    def _out_of_patience(self) -> Stopped | None:
        patience = self.config.patience
        return "patience" if patience is not None and self.misses >= patience else None

    def _save(self, state: TrainState, step: int, why: Why, *, scored: bool) -> None:
        if self.checkpoints is None:
            return
        # A checkpoint vouches for every record up to its step.
        self._flush()
        loop = {
            "data": self.batches.get_state(),
            "best": self.best if math.isfinite(self.best) else None,
            "misses": self.misses,
            "why": why,
            # An evaluation belongs to the checkpoint of its own step only.
            "evaluation": self.evaluation if scored else {},
        }
        self.checkpoints.save(step, state, loop, self.evaluation.get("validation_loss") if scored else None)
        self.saves.restart(step)


def _same(state: TrainState) -> TrainState:
    return state


def _finite(metrics: Mapping[str, Any]) -> bool:
    """Whether the loss and the gradient of a step are numbers, and so the state after it."""
    return all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm") if name in metrics)
