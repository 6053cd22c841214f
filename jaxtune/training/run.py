"""One run from configuration to summary: what ``jaxtune train`` does."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Literal

from jaxtune.config import Config
from jaxtune.parallel.distributed import is_writer
from jaxtune.parallel.platform import device_memory_peak
from jaxtune.telemetry.progress import watched
from jaxtune.telemetry.writers import (
    JsonlWriter,
    MetricWriter,
    TensorBoardWriter,
    WandbWriter,
    Writers,
    check_wandb,
)
from jaxtune.training.adapter_start import with_adapter
from jaxtune.training.checkpoints import Checkpoints, UnreadableCheckpoint
from jaxtune.training.fit import FitResult, fit
from jaxtune.training.hooks import Listener, OnPlan, ShouldStop, never
from jaxtune.training.idle_keys import tell_idle_keys
from jaxtune.training.loadable import save_loadable
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.run_options import RunOptions
from jaxtune.training.state import TrainState
from jaxtune.training.summary import RunSummary
from jaxtune.training.trainer import Trainer
from jaxtune.updates.peft.base import follow_base

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Training was stopped because a loss was not finite."""


def open_writers(directory: RunDirectory, config: Config, resume_at: int) -> Writers:
    """The configured metric writers, cut back to the step that a run resumes at; none where nothing is written."""
    writers: list[MetricWriter] = []
    if is_writer():
        writers.append(JsonlWriter(directory.metrics_path, resume_at))
        if config.telemetry.tensorboard:
            writers.append(TensorBoardWriter(directory.tensorboard_path, resume_at))
        if config.telemetry.wandb is not None:
            writers.append(
                WandbWriter(config.telemetry.wandb, config.name, directory.path, config.model_dump(mode="json"))
            )
    return Writers(writers)


def train(
    config: Config,
    *,
    listener: Listener | Literal["auto"] | None = "auto",
    should_stop: ShouldStop = never,
    on_plan: OnPlan | None = None,
    accept_changed_data: bool = False,
) -> RunSummary:
    """Trains one configuration in its run directory, or goes on where an earlier process was stopped.

    A run that differs from the one in its directory in more ``train.steps`` alone takes that one further: from its last
    checkpoint on, the learning rate is what the longer schedule has at those steps.

    Args:
      config: the run.
      listener: is told the progress; ``auto`` shows a bar where someone looks, at a terminal or in a notebook, and None
        shows nothing.
      should_stop: asked after every step; when true, the run saves and returns with ``stopped: "signal"``.
      on_plan: is told what is trained, rows of a table, before the first step.
      accept_changed_data: go on where the training or the validation split is not what it was; otherwise refused.

    Returns:
      The summary, as written to ``summary.json`` unless the run was stopped before its end.

    Raises:
      UserError: the input is wrong, the directory holds another run, another process runs this one, or its data have
        changed.
      Diverged: a loss was not finite; the last checkpoint before stays.
    """
    check_wandb(config.telemetry.wandb)
    directory = RunDirectory(config.directory)
    directory.check_place()
    config = with_adapter(config)
    if config.train.epochs is None:
        directory.check(config)
    opened = OpenedConfig(config)
    config = opened.config
    directory.check(config)
    if (finished := directory.read_summary()) is not None and not directory.taken_further(config):
        if is_writer():
            follow_base(directory.adapter_path)
        return RunSummary(finished)
    data = directory.follow_data(opened.fingerprints, accept=accept_changed_data)
    opened.data_changed = data.training_changed(opened.fingerprints)
    trainer = opened.trainer()
    if is_writer():
        tell_idle_keys(config, trainer.plan)
    if on_plan:
        on_plan(trainer.plan.table())
    told = RunOptions(listener=watched(config.name) if listener == "auto" else listener, should_stop=should_stop)
    if not is_writer():
        return _run(opened, trainer, directory, told)
    directory.claim(config)
    with directory.locked():
        directory.take_further(config)
        directory.write_data(data)
        return _run(opened, trainer, directory, told)


def _run(opened: OpenedConfig, trainer: Trainer, directory: RunDirectory, told: RunOptions) -> RunSummary:
    """Trains from the last checkpoint on, and writes what a finished run leaves."""
    config = opened.config
    checkpoints = Checkpoints(directory.checkpoints_path, keep=config.train.keep)
    writers = open_writers(directory, config, checkpoints.latest_step or 0)
    evaluator = opened.evaluator("validation")

    def evaluate(state: TrainState) -> dict[str, float]:
        assert evaluator is not None
        return evaluator.evaluate(*trainer.apply(state)).metrics

    options = dataclasses.replace(told, validation=opened.validation_batches, checkpoints=checkpoints, writer=writers)
    try:
        result = fit(trainer, opened.batches(), options, evaluate=evaluate if evaluator is not None else None)
    finally:
        writers.close()
    if result.stopped == "diverged":
        raise Diverged(
            f"the loss was not finite at step {result.step}; lower optimizer.learning_rate "
            f"(checkpoints up to step {checkpoints.latest_step or 0} are kept in {directory.checkpoints_path})"
        )
    summary = RunSummary(_summarize(opened, trainer, result, directory))
    if result.stopped == "signal":
        return summary
    state, exported_step = _to_export(trainer, checkpoints, result)
    checkpoints.close()
    for name, path in save_loadable(directory, opened, trainer, state).items():
        summary[name] = {"path": path, "step": exported_step}
    if is_writer():
        directory.write_summary(summary)
    return summary


def _to_export(trainer: Trainer, checkpoints: Checkpoints, result: FitResult) -> tuple[TrainState, int]:
    """The state with the best evaluation where several were made, else the last."""
    best = checkpoints.best_step
    if best is None or best == result.step:
        return result.state, result.step
    try:
        return checkpoints.restore(best, result.state)[0], best
    except UnreadableCheckpoint as error:
        logger.warning("%s; the last step, %d, is taken instead of the best one", error, result.step)
        return result.state, result.step


def _summarize(opened: OpenedConfig, trainer: Trainer, result: FitResult, directory: RunDirectory) -> dict[str, Any]:
    finite = {
        name: value if math.isfinite(value) else None for name, value in {**result.metrics, **result.evaluation}.items()
    }
    return {
        "name": opened.config.name,
        "run_dir": str(directory.path),
        "stopped": result.stopped,
        "steps": result.step,
        "planned": [{"from_step": since, "steps": steps} for since, steps in result.planned],
        "metrics": finite,
        "trained_parameters": trainer.plan.trainable_parameters(trainer.hyperparameters),
        "examples": {part: len(examples) for part, examples in opened.examples.items()},
        "examples_per_step": result.examples_per_step,
        # Where no step was left to train, the program is one that an earlier process had compiled.
        "compilations": max(trainer.traces["step"], 1),
        "seconds": result.seconds,
        "peak_device_bytes": device_memory_peak(),
    }
