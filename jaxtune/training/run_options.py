"""What a run may be given besides its trainer and its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from jaxtune.config.training_sections import TrainConfig
from jaxtune.telemetry.writers import MetricWriter
from jaxtune.training.batches import HostBatch
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.hooks import Listener, ShouldStop, never


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Of :func:`jaxtune.training.fit.fit` and :class:`jaxtune.training.fit.Run`.

    Attributes:
      hyperparameters: overrides of single values by dotted key.
      validation: batches whose loss is the ``validation_loss`` of an evaluation; the objective's metrics are logged
        beside it, as ``validation_…``.
      checkpoints: where to resume from and write to.
      writer: takes the metrics of every logged step.
      listener: is told the same, for people.
      should_stop: asked after every step; when true the loop saves a checkpoint and returns.
      config: how often to log, evaluate and save, and the patience; the trainer's, if None. One trainer may serve runs
        that differ in it.
    """

    hyperparameters: Mapping[str, float] | None = None
    validation: Iterable[HostBatch] | None = None
    checkpoints: Checkpoints | None = None
    writer: MetricWriter | None = None
    listener: Listener | None = None
    should_stop: ShouldStop = never
    config: TrainConfig | None = None
