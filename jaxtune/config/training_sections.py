"""The ``train`` and ``parallel`` sections: the training loop, and its devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from jaxtune.config.section import (
    Free,
    HostOnly,
    Later,
    LoopOnly,
    Parsed,
    PositiveInt,
    Probability,
    Section,
    Seed,
    Traced,
    located,
    parsed,
)


class KeepConfig(Section):
    """Which checkpoints of a run stay."""

    latest: PositiveInt = Field(
        default=2,
        description="So many of the newest checkpoints; where the last cannot be read, a run goes on from the one "
        "before.",
    )
    best: PositiveInt = Field(default=1, description="So many of the checkpoints with the lowest validation loss.")
    every: PositiveInt | None = Field(
        default=None,
        description="Checkpoints of steps that are multiples of this, which are then written as well; none if unset.",
    )


class TrainConfig(Section):
    """The training loop."""

    steps: Annotated[PositiveInt, Traced()] | None = Field(default=None, description="Optimizer steps; or give epochs.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Passes over data.train, parts of one as well; or give steps."
    )
    batch_size: PositiveInt = Field(
        default=16, description="Rows per optimizer step, over all devices and microbatches."
    )
    accumulate: PositiveInt = Field(default=1, description="Microbatches that one step's rows are computed in.")
    sequence_length: PositiveInt = Field(default=512, description="Tokens of a row.")
    seed: Annotated[Seed, LoopOnly()] = Field(
        default=0, description="Seed of the order of examples, of what is trained from random values, and of dropout."
    )
    evaluate_every: Annotated[PositiveInt | None, LoopOnly()] = Field(
        default=None, description="Steps between evaluations on data.validation; only at the end if unset."
    )
    checkpoint_every: Annotated[PositiveInt | None, LoopOnly()] = Field(
        default=None, description="Steps between checkpoints; at evaluations if unset."
    )
    checkpoint_minutes: Annotated[Annotated[float, Field(gt=0)] | None, HostOnly(), Free()] = Field(
        default=5.0, description="Minutes after which a checkpoint is written in any case; null: never by time."
    )
    keep: Annotated[Parsed[KeepConfig, Mapping[str, Any]], HostOnly(), Free()] = parsed(
        "Which checkpoints stay.", default=KeepConfig()
    )
    log_every: Annotated[PositiveInt, LoopOnly()] = Field(
        default=10, description="Steps between records of the training metrics."
    )
    patience: Annotated[PositiveInt | None, LoopOnly()] = Field(
        default=None,
        description="Stop after this many evaluations (by evaluate_every) without improvement; never if unset.",
    )
    label_smoothing: Annotated[Probability, Traced()] = Field(
        default=0.0, description="Share of a target's probability that goes to all tokens of the vocabulary alike."
    )
    z_loss: Annotated[float, Field(ge=0.0), Traced()] = Field(
        default=0.0, description="Factor of log(Z)^2, which is added to a token's loss; Z is the softmax's denominator."
    )

    neftune_alpha: Annotated[Annotated[float, Field(ge=0.0), Traced()] | None, Later(None)] = Field(
        default=None,
        description="Size of noise on the embeddings in training, uniform up to this over the root of a document's "
        "length times the model's width (NEFTune, arXiv:2310.05914: 5 to 15); none if unset.",
    )

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("give either steps or epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs {self.epochs:g}: give one and set the other to null "
                f"(train.epochs=null or train.steps=null)"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} microbatches")
        if self.patience is not None and self.evaluate_every is None:
            message = "patience counts evaluations, and there is none but the last one without train.evaluate_every"
            raise located(("patience",), self.patience, message)
        return self


class ParallelConfig(Section):
    """The device mesh. One axis may be -1: it takes the devices that are left."""

    trial: int = Field(
        default=1,
        description="In a search: parts of the population, each on devices of its own with a copy of the model. Set "
        "data to what one model needs, and this to -1.",
    )
    data: int = Field(default=-1, description="Devices that a batch is divided over, each with all of the model.")
    fsdp: int = Field(default=1, description="Devices that a batch and the model's parameters are divided over.")
    tensor: int = Field(default=1, description="Devices that each layer's heads and features are divided over.")
