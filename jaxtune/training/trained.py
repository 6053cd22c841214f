"""What a run left: its trained state, put back onto the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jaxtune.config import with_overrides
from jaxtune.errors import UserError
from jaxtune.models import Adapter, Params
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.state import TrainState
from jaxtune.training.trainer import Trainer
from jaxtune.updates.peft.load import read_adapter
from jaxtune.updates.resolved import overlaid


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with what was trained.

    Attributes:
      trainer: over the model.
      state: what was trained; at step 0, nothing.
      origin: what it is, for people.
    """

    trainer: Trainer
    state: TrainState
    origin: str

    def apply(self) -> tuple[Params, dict[str, Adapter]]:
        """Parameters and adapters for generation."""
        return self.trainer.apply(self.state)


def trained(opened: OpenedConfig, *, adapter: str | Path | None = None, untuned: bool = False) -> Trained:
    """The trained state of a configuration's run directory, of an adapter, or the untuned model.

    Of a run the best evaluated checkpoint is taken, or the last where none was evaluated.

    Args:
      opened: the opened configuration.
      adapter: a PEFT directory, instead of the run's checkpoint.
      untuned: the model as it is.

    Raises:
      UserError: there is no checkpoint, or it is one of another configuration.
    """
    config = opened.config
    if config.train.steps is None:
        # Epochs of examples that were not opened; nothing is trained here, so any length will do.
        config = with_overrides(config, {"train.steps": 1, "train.epochs": None})
    if adapter is not None:
        read = read_adapter(adapter, opened.model)
        trainer = Trainer(opened.model, read.plan, config.train, config.optimizer)
        state = trainer.init(_known(read.values, trainer))
        state = dataclasses.replace(state, trainable=read.trainable, fixed=overlaid(state.fixed, read.fixed))
        return Trained(trainer, state, f"adapter {adapter}")
    trainer = opened.trainer(config)
    state = trainer.init()
    if untuned:
        return Trained(trainer, state, "the untuned model")
    directory = RunDirectory(opened.config.directory)
    if directory.journal_path.exists():
        raise UserError(
            f"{directory.path} holds a study, and this is its configuration, not that of one of its trials; "
            "jaxtune.search.trained opens those"
        )
    if not directory.checkpoints_path.is_dir():
        raise UserError(
            f"{directory.checkpoints_path}: no checkpoint; run jaxtune train first, or name --adapter or --untuned"
        )
    loaded = Checkpoints.load(directory.checkpoints_path, state, "best")
    if loaded is None:
        raise UserError(f"{directory.checkpoints_path}: no checkpoint was finished there")
    step, state = loaded
    return Trained(trainer, state, f"{directory.path} at step {step}")


def _known(values: Mapping[str, float], trainer: Trainer) -> dict[str, float]:
    return {name: value for name, value in values.items() if name in trainer.hyperparameters}
