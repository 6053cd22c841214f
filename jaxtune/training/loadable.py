"""What a training leaves for other programs: an adapter that PEFT loads, else a whole model that transformers loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from jaxtune.config.paths import located
from jaxtune.errors import UserError
from jaxtune.files import replaced_directory
from jaxtune.layout import RunFiles
from jaxtune.models import save_model
from jaxtune.parallel.distributed import is_writer
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.state import TrainState
from jaxtune.training.trainer import Trainer
from jaxtune.updates import merge_adapters
from jaxtune.updates.peft.export import exported_bytes

logger = logging.getLogger(__name__)


def save_loadable(
    directory: RunFiles,
    opened: OpenedConfig,
    trainer: Trainer,
    state: TrainState,
    hyperparameters: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Writes the adapter where one holds all that was trained, else the model with it merged in.

    A model takes its name when all of it is there. With several processes, all must call this; the first writes.

    Args:
      directory: of the run, or the study.
      opened: the base, and its tokenizer.
      trainer: whose plan was trained.
      state: what was trained.
      hyperparameters: overrides of the trainer's by dotted key.

    Returns:
      ``{"adapter": path}`` or ``{"model": path}``; nothing where the model's family cannot be written, which is warned
      of: the checkpoints are there.
    """
    config = opened.config
    # Hours of training must not end in an error about what lies beside the weights, or in what an adapter cannot say.
    if trainer.plan.exports:
        base, revision = located(config).model.path, config.model.revision
        try:
            trainer.save_adapter(
                directory.adapter_path, state, base=base, revision=revision, hyperparameters=hyperparameters
            )
            return {"adapter": str(directory.adapter_path)}
        except UserError as error:
            logger.warning("no adapter is written, but the whole model: %s", error)
    values = {**trainer.hyperparameters, **(hyperparameters or {})}
    merged = merge_adapters(opened.model, trainer.plan, state.trainable, values, state.fixed)
    source, revision = located(config).model.tokenizer_source
    for tokenizer in (source, None):
        try:
            with replaced_directory(directory.model_path, write=is_writer()) as folder:
                save_model(merged, folder, tokenizer_from=tokenizer, tokenizer_revision=revision if tokenizer else None)
            return {"model": str(directory.model_path)}
        except UserError as error:
            what = "tokenizer is not written beside the trained model" if tokenizer else "trained model is not written"
            logger.warning("the %s: %s", what, error)
    return {}


def loadable_bytes(trainer: Trainer) -> int:
    """Bytes that :func:`save_loadable` takes on the disk, but for the tokenizer and the configuration's files."""
    if trainer.plan.exports:
        return exported_bytes(trainer.plan, trainer.hyperparameters)
    return trainer.plan.base_size * next(iter(trainer.params.values())).dtype.itemsize
