"""The training loop: steps, evaluations, checkpoints, early stopping, resuming.

The loop of one run (:class:`Run`) does not call the step itself: it asks for one by yielding a batch and is told the
outcome. So :func:`fit` drives a run by itself, and a population drives many of them through one compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax

from jaxtune.config.metrics import VALIDATION_LOSS
from jaxtune.config.training_sections import TrainConfig
from jaxtune.errors import UserError
from jaxtune.evaluation.loss import LossResult
from jaxtune.telemetry.tables import html_table
from jaxtune.telemetry.throughput import Throughput
from jaxtune.telemetry.writers import CutBack
from jaxtune.training.batches import Ahead, Batches, HostBatch, as_batches, count_examples, count_tokens
from jaxtune.training.loop_state import LoopState, Planned
from jaxtune.training.run_options import RunOptions
from jaxtune.training.save_schedule import SaveSchedule, Why, tell_going_on, tell_planned_anew
from jaxtune.training.state import TrainState, check_alive
from jaxtune.training.step_log import StepLog


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
class Informs(Protocol):
    """A trainer that has methods which start from data."""

    observed_batches: int

    def informed(self, state: TrainState, batches: Sequence[HostBatch]) -> TrainState:
        """The state with what is learned of the batches."""
        ...


Stopped = Literal["finished", "paused", "patience", "signal", "diverged"]
Evaluate = Callable[[TrainState], Mapping[str, float]]
StepOutcome = tuple[Callable[[], TrainState], Mapping[str, Any]]
"""What a step came to: the state after it, made when it is asked for, and its metrics, on the device or not."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the loop yields where an evaluation asks for further metrics of a state; it is sent these."""

    state: TrainState


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult:
    """How a call of :func:`fit` ended.

    Attributes:
      state: after the last step.
      step: optimizer steps done in all; where the run diverged, the first step that was not finite.
      steps_run: of them in this call.
      stopped: ``finished`` (end of the schedule), ``paused`` (at ``until``), ``patience`` (no improvement), ``signal``
        or ``diverged`` (a loss was not finite).
      metrics: the last training metrics; of an earlier call, where this one had no step left.
      evaluation: the last evaluation, or empty.
      examples: examples seen in this call; one cut over several rows counts in each.
      examples_per_step: their mean over the whole run; None before its first step.
      seconds: wall-clock time of this call.
      planned: how long the run was to be, and from which step on; more than one where it was taken further.
    """

    state: TrainState
    step: int
    steps_run: int
    stopped: Stopped
    metrics: Mapping[str, float]
    evaluation: Mapping[str, float]
    examples: int
    examples_per_step: float | None
    seconds: float
    planned: Sequence[Planned]

    def __repr__(self) -> str:
        shown = {name: value for name, value in {**self.metrics, **self.evaluation}.items() if "loss" in name}
        losses = "".join(f", {name}={value:.6g}" for name, value in shown.items())
        return f"FitResult({self.stopped} at step {self.step}{losses}, seconds={self.seconds:.3g})"

    def _repr_html_(self) -> str:
        row = {"step": self.step, "stopped": self.stopped, **self.metrics, **self.evaluation, "seconds": self.seconds}
        return html_table([row], title="fit")


Loop = Generator[HostBatch | Asked, StepOutcome | Mapping[str, Any], FitResult]
"""One run's loop, see :meth:`Run.loop`."""


def fit(
    trainer: Steps,
    batches: Batches | Iterable[HostBatch],
    options: RunOptions | None = None,
    *,
    state: TrainState | None = None,
    until: int | None = None,
    evaluate: Evaluate | None = None,
    evaluate_at_end: bool = True,
) -> FitResult:
    """Trains from a state, or from the newest checkpoint that can be read, up to a step.

    Args:
      trainer: what a step is.
      batches: mappings of arrays by name, rows first, as :meth:`jaxtune.Trainer.step` takes them; an iterator without
        end, or an iterable that is begun again at its end. The position among them is part of every checkpoint: their
        own ``get_state()``, or else their number, and as many are passed over to go on.
      options: values, validation, checkpoints, and who is told.
      state: where to start if there is no checkpoint; a fresh one if None.
      until: stop after this many steps in all; the schedule stays planned for ``train.steps``.
      evaluate: further metrics of an evaluation; a ``validation_loss`` among them replaces that of the validation.
      evaluate_at_end: evaluate after the last step as well.

    Raises:
      UserError: batches end too early or do not fit, or an earlier step has used the state up.
    """
    run = Run(trainer, batches, options, asks=evaluate is not None)
    state = run.start(state)
    loop = run.loop(until, evaluate_at_end)
    try:
        wanted = next(loop)
        while True:
            if isinstance(wanted, Asked):
                assert evaluate is not None
                wanted = loop.send(evaluate(wanted.state))
            else:
                state, metrics = trainer.step(state, wanted, run.overrides)
                wanted = loop.send((functools.partial(_same, state), metrics))
    except StopIteration as end:
        return end.value


class Run:
    """One run's side of the training: its batches, metrics, evaluations, checkpoints and early stopping.

    Args:
      trainer: what a step is.
      batches: see :func:`fit`.
      options: values, validation, checkpoints, and who is told.
      asks: whether an evaluation asks for further metrics (:class:`Asked`).

    Attributes:
      overrides: the hyperparameters that differ from the trainer's.
    """

    def __init__(
        self,
        trainer: Steps,
        batches: Batches | Iterable[HostBatch],
        options: RunOptions | None = None,
        *,
        asks: bool = False,
    ):
        options = options or RunOptions()
        self.trainer, self.batches, self.asks = trainer, as_batches(batches), asks
        self.overrides = dict(options.hyperparameters or {})
        # They are gone through at every evaluation.
        self.validation = list(options.validation) if isinstance(options.validation, Iterator) else options.validation
        self.checkpoints, self.writer = options.checkpoints, options.writer
        self.listener, self.should_stop = options.listener, options.should_stop
        self.config = trainer.config if options.config is None else options.config
        self.total = int(self.overrides.get("train.steps", trainer.hyperparameters["train.steps"]))
        self.past = LoopState()
        self.past.plan(0, self.total)
        self.throughput = trainer.throughput(self.overrides)
        self.log = StepLog(self.writer, self.listener, self.throughput)
        self.examples = 0
        self.saves = SaveSchedule(self.config)
        self._state: Callable[[], TrainState] | None = None
        self._first = 0

    def start(self, state: TrainState | None = None) -> TrainState:
        """The state to begin with: of the newest checkpoint, or else the one given, or a fresh one."""
        begun, self._first = self._start(state)
        self._state = functools.partial(_same, begun)
        return begun

    def loop(self, until: int | None = None, evaluate_at_end: bool = True) -> Loop:
        """Yields the batch of each step, is sent what the step came to (see :class:`Asked`), and returns how it ended.

        Args:
          until: stop after this many steps in all.
          evaluate_at_end: evaluate after the last step as well.
        """
        try:
            return (yield from self._loop(until, evaluate_at_end))
        finally:
            if self.listener:
                self.listener.on_end()

    def _loop(self, until: int | None, evaluate_at_end: bool) -> Loop:
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
            state, metrics = cast(StepOutcome, (yield batch))
            step += 1
            self.throughput.count(count_tokens(batch))
            self.examples += count_examples(batch)
            self.log.launched(step, metrics, logged=step % self.config.log_every == 0 or step == last)
            evaluated = self._due(step, self.config.evaluate_every) and step < last and not self.log.diverged(step)
            if evaluated:
                stopped = yield from self._evaluate(state(), step)
            # At the last step there is nothing to stop any more: the end is evaluated and saved as ever.
            if stopped is None and step < last and self.should_stop():
                stopped = "signal"
            why: Why | None = None
            if step < last:
                why = "stop" if stopped is not None else self.saves.why(step, evaluated=evaluated)
            # Logged or not, the step is read before its state may take the place of the last good checkpoint.
            if self.log.first_diverged is not None or (why is not None and self.log.diverged(step)):
                stopped = "diverged"
            elif why is not None:
                self._save(state(), step, why, scored=evaluated)
        self.log.read()
        trained = self._past(step)
        if self.log.first_diverged is not None:
            step, stopped = self.log.first_diverged, "diverged"
        if stopped is None:
            # Resumed behind the last step, the evaluation stands in the checkpoint and in the metrics already.
            known = self.past.evaluated == step
            scored = evaluate_at_end and not known and (self.validation is not None or self.asks)
            if scored:
                # Where a run pauses is no part of it: gone on, it ends as if it had not paused.
                yield from self._evaluate(state(), step, counts=self._due(step, self.config.evaluate_every))
            if step > start:
                self._save(state(), step, "end", scored=scored)
            stopped = "finished" if step >= self.total else "paused"
        self.log.flush()
        if self.checkpoints:
            self.checkpoints.wait()
        return FitResult(
            state=state(),
            step=step,
            steps_run=step - start,
            stopped=stopped,
            metrics=self.log.metrics,
            evaluation=self.past.evaluation,
            examples=self.examples,
            examples_per_step=trained.examples_per_step,
            seconds=time.perf_counter() - begin,
            planned=self.past.planned,
        )

    def _start(self, state: TrainState | None) -> tuple[TrainState, int]:
        latest = self.checkpoints.latest_step if self.checkpoints else None
        state = self.trainer.init(self.overrides) if state is None else state
        check_alive(state)
        if self.checkpoints is None or (found := self.checkpoints.resume(state)) is None:
            return self._informed(state), int(state.step)
        step, restored, loop = found
        if step != latest and isinstance(self.writer, CutBack):
            self.writer.cut_back(step)
        if "data" not in loop:
            raise UserError(
                f"{self.checkpoints.directory / str(step)}: no checkpoint of fit: it does not tell the position among "
                "the batches; restore it and give its state as state=, with other checkpoints"
            )
        self.batches.set_state(loop["data"])
        self.past = LoopState.read(loop, step)
        self.log.metrics = self.past.metrics
        tell_going_on(step, self.total, self.checkpoints.directory, loop.get("why"))
        if (before := self.past.plan(step, self.total)) is not None:
            tell_planned_anew(step, before, self.total)
        return restored, step

    def _informed(self, state: TrainState) -> TrainState:
        """A state at the start with what its methods learn of the first batches, which are still taken."""
        if not isinstance(self.trainer, Informs) or not (count := self.trainer.observed_batches) or int(state.step):
            return state
        self.batches = Ahead(self.batches)
        return self.trainer.informed(state, self.batches.look(min(count, self.total)))

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and step % every == 0

    def _evaluate(
        self, state: TrainState, step: int, *, counts: bool = True
    ) -> Generator[Asked, StepOutcome | Mapping[str, Any], Stopped | None]:
        """Evaluates and, where it counts for early stopping, tells that; a reason to stop, or None."""
        self.log.read()
        jax.block_until_ready(state.step)
        self.throughput.pause()
        evaluation: dict[str, float] = {}
        if self.validation is not None:
            result = self.trainer.evaluate(state, self.validation, self.overrides)
            evaluation = {VALIDATION_LOSS: result.loss, "validation_tokens": result.tokens}
            if result.standard_error is not None:
                evaluation[f"{VALIDATION_LOSS}_standard_error"] = result.standard_error
            evaluation |= {f"validation_{name}": value for name, value in result.metrics.items()}
        if self.asks:
            evaluation |= cast(Mapping[str, float], (yield Asked(state)))
        self.past.evaluation, self.past.evaluated = evaluation, step
        self.log.evaluated(step, evaluation)
        self.throughput.resume()
        score = evaluation.get(VALIDATION_LOSS)
        if score is None or not counts:
            return None
        self.past.improved(score)
        return self._out_of_patience()

    def _out_of_patience(self) -> Stopped | None:
        patience = self.config.patience
        return "patience" if patience is not None and self.past.misses >= patience else None

    def _save(self, state: TrainState, step: int, why: Why, *, scored: bool) -> None:
        if self.checkpoints is None:
            return
        # A checkpoint vouches for every record up to its step.
        self.log.flush()
        loop = {"data": self.batches.get_state(), "why": why, **self._past(step).record()}
        self.checkpoints.save(step, state, loop, self.past.evaluation.get(VALIDATION_LOSS) if scored else None)
        self.saves.restart(step)

    def _past(self, step: int) -> LoopState:
        """What is known after a step of this call."""
        steps, examples = self.past.steps + step - self._first, self.past.examples + self.examples
        return dataclasses.replace(self.past, steps=steps, examples=examples, metrics=self.log.metrics)


def _same(state: TrainState) -> TrainState:
    return state
