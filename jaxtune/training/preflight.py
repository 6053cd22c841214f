"""Everything that can be checked before training: files, data, shapes, what is trained, FLOPs, memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtune.config import Config
from jaxtune.training.experiment import Experiment
from jaxtune.training.run_directory import RunDirectory


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


def preflight(config: Config) -> Preflight:
    """Opens everything that a run opens and compiles its step, but trains and writes nothing.

    Raises:
      UserError: anything that would stop the run is wrong.
    """
    directory = RunDirectory(config.directory)
    experiment = Experiment(config)
    directory.check(experiment.config)
    trainer = experiment.trainer()
    batches = experiment.batches()
    compiled = trainer.compile_step(next(batches))
    batches.close()
    return Preflight(
        name=config.name,
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
