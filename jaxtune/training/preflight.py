"""Everything that can be checked before training: files, data, shapes, what is trained, FLOPs, memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxtune.config import Config
from jaxtune.telemetry.writers import check_wandb
from jaxtune.training.idle_keys import idle_keys
from jaxtune.training.loadable import loadable_bytes
from jaxtune.training.memory import check_base, checked_memory
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.trainer import Trainer


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
      memory: bytes of the compiled step on one device: ``arguments``, ``temporaries``, ``outputs``, ``total``, and what
        the device has ``free``, where the platform tells.
      disk: bytes of the ``adapter`` or the ``model`` that the end of the run leaves, and of each of its
        ``checkpoints``.
      warnings: keys that never act.
    """

    name: str
    plan: list[dict[str, Any]]
    trained_parameters: int
    examples: dict[str, int]
    steps: int
    flops_per_step: float
    memory: dict[str, int]
    disk: dict[str, int]
    warnings: list[str]

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
      UserError: anything that would stop the run is wrong, or its step does not fit the memory.
    """
    check_wandb(config.telemetry.wandb)
    if directory is not None:
        directory.check_place()
    check_base(config)
    opened = OpenedConfig(config)
    if directory is not None:
        directory.check(opened.config)
        directory.follow_data(opened.fingerprints, accept=accept_changed_data)
    trainer = opened.trainer()
    return examine(opened, trainer, checked_memory(opened, trainer))


def examine(opened: OpenedConfig, trainer: Trainer, memory: dict[str, int]) -> Preflight:
    """What a trainer of an opened configuration would do.

    Args:
      opened: the opened configuration.
      trainer: of it.
      memory: of its step.
    """
    return Preflight(
        name=opened.config.name,
        plan=trainer.plan.table(),
        trained_parameters=trainer.plan.trainable_parameters(trainer.hyperparameters),
        examples={part: len(examples) for part, examples in opened.examples.items()},
        steps=trainer.config.steps or 0,
        flops_per_step=trainer.step_flops().total,
        memory=memory,
        disk={
            "adapter" if trainer.plan.exports else "model": loadable_bytes(trainer),
            "checkpoints": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state())),
        },
        warnings=idle_keys(opened.config, trainer.plan),
    )
