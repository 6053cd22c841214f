"""The configuration as a whole; each larger section has a module of its own.

A field says of its key what it is, its type, default and bounds.

Unknown keys are errors. What may follow from a key's value is said by a mark in its annotation, or by its section's
(:class:`~jaxtune.config.section.Role`): the hyperparameters that the training step takes are the
:class:`~jaxtune.config.section.Traced` ones (:mod:`jaxtune.config.hyperparameters`), and every other list of keys is
derived likewise (:mod:`jaxtune.config.roles`), so a key is never listed twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from jaxtune.config.data_section import DataConfig
from jaxtune.config.experiments import ExperimentsConfig
from jaxtune.config.metrics import TaskName
from jaxtune.config.optimizer_section import OPTIMIZERS, OptimizerSection, default_optimizer
from jaxtune.config.search_section import SearchConfig
from jaxtune.config.section import (
    Compiled,
    Free,
    HostOnly,
    LocalPath,
    LoopOnly,
    Parsed,
    PerTrial,
    PositiveInt,
    Relocatable,
    Section,
    Shared,
    UserPath,
    located,
    parsed,
)
from jaxtune.config.training_sections import ParallelConfig, TrainConfig
from jaxtune.config.update_rules import Rule, reference_update

LONGEST_NAME = 240
"""Bytes of a folder's name: file systems take 255, and names are made from it."""


class ModelConfig(Section):
    """The pretrained model."""

    path: LocalPath = Field(description="Directory, Hub id, or 'jaxtune:nano' for the model inside the package.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a Hub model; its main branch if unset."
    )
    tokenizer: LocalPath | None = Field(
        default=None,
        description="Directory or Hub id of the tokenizer, if not the model's own; revision is not asked of it.",
    )
    adapter: UserPath | None = Field(
        default=None,
        description="Directory of a PEFT adapter (a run's 'adapter' is one) that training starts from. Its modules, "
        "ranks and alphas are those of update, which can be left out, and cannot be searched. If unset, from the base.",
    )
    initialize: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="'random' reads only config.json and starts from random weights (pretraining).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Compute dtype and dtype of frozen weights; auto is bfloat16 on accelerators, float32 on CPU.",
    )
    quantize: Annotated[Literal["nf4", "int8", "fp8"] | None, Shared()] = Field(
        default=None,
        description="Holds the frozen kernels of the layers in few bits: nf4 (4.25 bits each, QLoRA), int8 or fp8 (8). "
        "Adapters train beside them; embeddings, norms and head stay as they are. If unset, in dtype.",
    )
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="What the backward pass recomputes: nothing, all but matmuls, or every layer."
    )

    @model_validator(mode="after")
    def _adapted(self) -> ModelConfig:
        if self.adapter is not None and self.initialize == "random":
            message = "an adapter was trained on pretrained weights: leave model.initialize out, or the adapter"
            raise located(("adapter",), self.adapter, message)
        if self.quantize is not None and self.initialize == "random":
            message = "random weights are there to be trained, and codes are not: leave model.quantize out"
            raise located(("quantize",), self.quantize, message)
        return self

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Path and revision of the tokenizer: the model's; a tokenizer of its own has no revision."""
        return (self.path, self.revision) if self.tokenizer is None else (self.tokenizer, None)


class EvaluationConfig(Section):
    """The task metric, measured by generating answers."""

    task: TaskName = Field(
        default="none",
        description="'extraction' compares generated answers with the completions: exact match and F1. 'none' measures "
        "the loss alone.",
    )
    batch_size: PositiveInt = Field(
        default=32,
        description="Prompts that are answered at the same time, in a population those of all its trials together.",
    )
    max_new_tokens: PositiveInt = Field(default=32, description="Tokens after which an answer ends in any case.")
    stop: str | None = Field(
        default="\n",
        description="Generation of an answer ends here, and at the end tokens of model, tokenizer and chat template.",
    )
    limit: PositiveInt | None = Field(
        default=None, description="Evaluate on this many examples, the first ones; on all if unset."
    )


class TelemetryConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    tensorboard: bool = Field(default=True, description="Event files for TensorBoard, in the run directory.")
    wandb: str | None = Field(
        default=None, description="Weights & Biases project; needs the wandb package; nothing goes there if unset."
    )


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Config(Section):
    """One run or one study."""

    name: Annotated[str, HostOnly()] = Field(
        default="run",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        max_length=LONGEST_NAME,
        description="Name of the run or study, and of its folder where run_dir is unset.",
    )
    run_dir: Annotated[UserPath | None, HostOnly(), Relocatable()] = Field(
        default=None,
        description="Default: runs/<name>. In the config.yaml of a run directory: that directory, wherever it is now.",
    )
    paths_from: Annotated[list[UserPath], BeforeValidator(_listed), HostOnly(), Relocatable()] = Field(
        default_factory=list,
        description="Folders that the relative paths to model, data and earlier studies are meant from: the first that "
        "has them. If empty, the folder of the configuration's file, then the working directory; a run directory "
        "keeps them. Folders that are relative themselves are meant from that file.",
    )
    model: Annotated[Parsed[ModelConfig, Mapping[str, Any]], Compiled()] = Field(description="The pretrained model.")
    data: Annotated[Parsed[DataConfig, Mapping[str, Any]], Compiled()] = Field(
        description="Rows, and how they become text and batches."
    )
    train: Annotated[Parsed[TrainConfig, Mapping[str, Any]], Compiled(), PerTrial()] = Field(
        description="The training loop."
    )
    optimizer: Annotated[
        SerializeAsAny[Parsed[OptimizerSection, Mapping[str, Any]]],
        BeforeValidator(OPTIMIZERS.parse),
        Compiled(),
        PerTrial(),
    ] = parsed(
        "What moves the trained parameters, and its schedule; AdamW by default.", default_factory=default_optimizer
    )
    update: Annotated[Parsed[list[Rule], Sequence[Rule | Mapping[str, Any]]], Compiled(), PerTrial()] = parsed(
        "What is trained: rules, the first that matches a parameter decides; by default a low-rank term of the "
        "queries and values (rank 16, alpha 32, dropout 0.1).",
        default_factory=lambda: list(reference_update()),
        min_length=1,
    )
    parallel: Annotated[Parsed[ParallelConfig, Mapping[str, Any]], Compiled()] = parsed(
        "The device mesh.", default=ParallelConfig()
    )
    kernels: Annotated[Literal["auto", "xla", "pallas", "interpret"], Shared()] = Field(
        default="auto",
        description="What computes products with adapters: the best for platform and shape, XLA, or the platform's own "
        "Pallas kernel (TPU, Hopper). 'interpret' runs that of TPUs anywhere, for tests, very slowly.",
    )
    evaluation: Annotated[Parsed[EvaluationConfig, Mapping[str, Any]], LoopOnly()] = parsed(
        "The task metric, measured by generating answers.", default=EvaluationConfig()
    )
    search: Annotated[Parsed[SearchConfig | None, Mapping[str, Any]], HostOnly()] = parsed(
        "What `jaxtune search` tries; one configuration is trained if unset.", default=None
    )
    study: Annotated[Parsed[ExperimentsConfig, Mapping[str, Any]], HostOnly(), Free()] = parsed(
        "The experiments of `jaxtune study`.", default=ExperimentsConfig()
    )
    telemetry: Annotated[Parsed[TelemetryConfig, Mapping[str, Any]], HostOnly()] = parsed(
        "Where metrics go, besides metrics.jsonl.", default=TelemetryConfig()
    )

    @field_validator("run_dir")
    @classmethod
    def _short_names(cls, value: str | None) -> str | None:
        for name in (value or "").split("/"):
            if len(name.encode()) > LONGEST_NAME:
                raise ValueError(f"{name[:20]}… is a name of {len(name.encode())} bytes; at most {LONGEST_NAME} fit")
        return value

    @model_validator(mode="after")
    def _whole_answers(self) -> Config:
        if self.data.too_long == "split" and self.evaluation.task != "none":
            raise ValueError(
                f"data.too_long: evaluation.task {self.evaluation.task} asks for whole answers, which 'split' cuts; "
                "choose truncate or drop"
            )
        return self

    @model_validator(mode="after")
    def _evaluated(self) -> Config:
        """Evaluations that nothing is evaluated in would do nothing, nor would a patience that counts them."""
        if self.train.evaluate_every is not None and self.data.validation is None:
            message = "evaluations need data.validation: that split is required, or leave evaluate_every out"
            raise located(("train", "evaluate_every"), self.train.evaluate_every, message)
        return self

    @property
    def directory(self) -> str:
        """The run directory."""
        return self.run_dir or f"runs/{self.name}"
