"""Everything that can be checked before training: files, data, shapes, what is trained, FLOPs, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.config import Config
from jaxtune.telemetry.writers import check_wandb
from jaxtune.training.experiment import Experiment
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.trainer import Trainer

CompileStep = Callable[[Mapping[str, np.ndarray]], jax.stages.Compiled]


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What a configuration would do.

    Attributes:
      name: of the run.
      plan: rows of the table of what is trained.
      trained_parameters: number of trained parameters.
      examples: examples of each split.
      steps: optimizer steps.
      flops_per_step: model FLOPs of a step.
      memory: bytes of the compiled step on one device: ``arguments``, ``temporaries``, ``outputs``, ``total``.
    """

    name: str
    plan: list[dict[str, Any]]
    trained_parameters: int
    examples: dict[str, int]
    steps: int
    flops_per_step: float
    memory: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"checked": True, **dataclasses.asdict(self)}


def preflight(config: Config, *, directory: RunDirectory | None = None, accept_changed_data: bool = False) -> Preflight:
    """Opens everything that a run opens and compiles its step, but trains and writes nothing.

    Args:
      config: the run.
      directory: where the run is to go; None leaves that out.
      accept_changed_data: see :func:`~jaxtune.training.run.train`.

    Raises:
      UserError: anything that would stop the run is wrong.
    """
    check_wandb(config.telemetry.wandb)
    if directory is not None:
        directory.check_place()
    experiment = Experiment(config)
    if directory is not None:
        directory.check(experiment.config)
        directory.follow_data(experiment.fingerprints, accept=accept_changed_data)
    return examine(experiment, experiment.trainer())


def examine(experiment: Experiment, trainer: Trainer, compile_step: CompileStep | None = None) -> Preflight:
    """What a trainer of an opened configuration would do; compiles its step.

    Args:
      experiment: the opened configuration.
      trainer: of it.
      compile_step: compiles what runs for a batch; the trainer's own step if None.

    Raises:
      UserError: the batch or what is trained does not fit.
    """
    batches = experiment.batches()
    compiled = (compile_step or trainer.compile_step)(next(batches))
    batches.close()
    return Preflight(
        name=experiment.config.name,
        plan=trainer.plan.table(),
        trained_parameters=trainer.plan.trainable_parameters(trainer.hyperparameters),
        examples={part: len(examples) for part, examples in experiment.examples.items()},
        steps=trainer.config.steps or 0,
        flops_per_step=trainer.step_flops().total,
        memory=compiled_memory(compiled),
    )


def compiled_memory(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program per device, from XLA's buffer assignment."""
    analysis = compiled.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "outputs": outputs,
        "total": arguments + temporaries + outputs,
    }
