"""Every configuration key: its type, its default, its bounds and what it does.

Unknown keys are errors. A number that can change between two runs of one compiled program is annotated with
:class:`~jaxtune.config.section.Traced`; the hyperparameters that the training step takes are derived from those
annotations (:mod:`jaxtune.config.hyperparameters`), so a key is never listed twice.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from jaxtune.config.section import (
    LocalPath,
    Parsed,
    PositiveInt,
    Probability,
    Section,
    Seed,
    Traced,
    UserPath,
    located,
    parsed,
)
from jaxtune.config.studies import StudiesConfig
from jaxtune.errors import nearest

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
        "ranks and alphas are those of update, which can be left out, and cannot be searched.",
    )
    initialize: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="'random' reads only config.json and starts from random weights (pretraining).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Compute dtype and dtype of frozen weights; auto is bfloat16 on accelerators, float32 on CPU.",
    )
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="What the backward pass recomputes: nothing, all but matmuls, or every layer."
    )

    @model_validator(mode="after")
    def _adapted(self) -> ModelConfig:
        if self.adapter is not None and self.initialize == "random":
            message = "an adapter was trained on pretrained weights: leave model.initialize out, or the adapter"
            raise located(("adapter",), self.adapter, message)
        return self

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Path and revision of the tokenizer: the model's; a tokenizer of its own has no revision."""
        return (self.path, self.revision) if self.tokenizer is None else (self.tokenizer, None)


class ExplodeConfig(Section):
    """Turns one row that holds a mapping (attribute -> value) into one example per entry."""

    field: str = Field(description="The field that holds the mapping.")
    key: str = Field(default="attribute", description="Name under which the prompt sees an entry's key.")
    value: str = Field(default="value", description="Name under which the prompt sees an entry's value.")
    schema_path: LocalPath | None = Field(
        default=None,
        description="JSON file: a list of keys, or keys per category; absent keys are then asked for as well. "
        "If unset, the keys that a row has.",
    )
    schema_by: str | None = Field(
        default=None,
        description="Field that picks the row's list of keys from schema_path; unset where that holds one list.",
    )
    absent: str = Field(default="n/a", description="The value of a key that the row lacks.")

    @model_validator(mode="after")
    def _schema(self) -> ExplodeConfig:
        if self.schema_by is not None and self.schema_path is None:
            raise ValueError("schema_by picks a list of keys from schema_path, which is not given")
        return self


class SourceConfig(Section):
    """Where rows come from. In YAML a plain string means ``path``."""

    path: LocalPath = Field(
        description="*.jsonl[.gz], *.parquet, 'tfds:name[/config]', or a datasets directory saved to disk."
    )
    split: str | None = Field(
        default=None,
        description="A split's name or slice: train, train[:200], train[10%:20%]; unset for files without splits.",
    )
    hash_split: tuple[float, float] | None = Field(
        default=None,
        description="[low, high], parts of 1: rows whose seeded hash of hash_by lies from low to below high, for data "
        "without splits; all rows if unset.",
    )
    hash_by: str | None = Field(default=None, description="Field to hash; the whole row if unset.")
    hash_seed: Seed = Field(default=0, description="Seed of the hash: another one draws other rows.")
    limit: PositiveInt | None = Field(default=None, description="Keep this many rows, the first ones; all if unset.")
    data_dir: LocalPath | None = Field(
        default=None, description="Directory of prepared TFDS data; TFDS's own if unset."
    )

    @model_validator(mode="after")
    def _used(self) -> SourceConfig:
        """A key without effect is a mistake: whoever wrote it expects something else."""
        if self.hash_by is not None and self.hash_split is None:
            raise ValueError("hash_by does nothing without hash_split")
        if self.data_dir is not None and not self.path.startswith("tfds:"):
            raise ValueError(f"data_dir is for 'tfds:' sources, not for {self.path}")
        return self


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_source)]


def _iso_date(value: str) -> str:
    try:
        datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"{value!r} is no date; write 2026-01-31, or 2026-01-31T14:30") from error
    return value


class DataConfig(Section):
    """Rows, how they become text, and how text becomes batches."""

    train: Parsed[Source, str | Mapping[str, Any]] = Field(description="Rows to train on.")
    validation: Parsed[Source | None, str | Mapping[str, Any]] = parsed(
        "Rows that a run is evaluated on and trials are scored on; none if unset.", default=None
    )
    test: Parsed[Source | None, str | Mapping[str, Any]] = parsed(
        "Rows that the winner, the reference and the untuned model are measured on at the end of a study, once each; "
        "none if unset.",
        default=None,
    )
    prompt: str | None = Field(
        default=None,
        description="Template with named fields: '{text}\\n{attribute}:'; if unset, completions follow nothing.",
    )
    completion: str | None = Field(
        default=None,
        description="Template of what is to be learnt: ' {value}'; required unless messages is given, instead of it.",
    )
    messages: str | None = Field(
        default=None,
        description="Field of chat messages, rendered by the tokenizer's chat template with the row's tools, if any; "
        "instead of prompt and completion.",
    )
    chat: bool = Field(
        default=False,
        description="Prompt and completion are the user's turn and the assistant's in the tokenizer's chat template, "
        "as instruction models were taught.",
    )
    explode: Parsed[ExplodeConfig | None, Mapping[str, Any]] = parsed(
        "Makes several examples of one row, one for each entry of a mapping in it; one example a row if unset.",
        default=None,
    )
    date: Annotated[str, AfterValidator(_iso_date)] | None = Field(
        default=None,
        description="Day that chat templates show which ask for today's (strftime_now): 2026-01-31, or with a time. If "
        "unset, the day that the run directory was begun on.",
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion",
        description="Tokens whose loss counts: those of completions (in a chat, of the assistant's turns), or all.",
    )
    packing: bool = Field(default=True, description="Several examples in a row; they never see each other.")
    too_long: Literal["error", "drop", "truncate", "split"] = Field(
        default="error",
        description="What happens to an example longer than train.sequence_length; split makes consecutive rows of it, "
        "so that every token is learnt once.",
    )

    @model_validator(mode="after")
    def _one_format(self) -> DataConfig:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("give either messages or prompt and completion, not both")
        if self.messages is None and self.completion is None:
            raise ValueError("give prompt and completion templates, or messages for chat data")
        if self.chat and self.messages is not None:
            message = (
                "puts prompt and completion through the chat template; messages are put through it without this key"
            )
            raise located(("chat",), self.chat, message)
        if self.chat and self.prompt is None:
            raise located(("chat",), self.chat, "needs data.prompt, which is the user's turn")
        if self.date is not None and not self.templated:
            raise ValueError("date does nothing without messages or chat: only chat templates show one")
        return self

    @property
    def templated(self) -> bool:
        """Whether examples are what the tokenizer's chat template makes of them."""
        return self.chat or self.messages is not None


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
    seed: Seed = Field(
        default=0, description="Seed of the order of examples, of what is trained from random values, and of dropout."
    )
    evaluate_every: PositiveInt | None = Field(
        default=None, description="Steps between evaluations on data.validation; only at the end if unset."
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None, description="Steps between checkpoints; at evaluations if unset."
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=5.0, description="Minutes after which a checkpoint is written in any case; null: never by time."
    )
    keep: Parsed[KeepConfig, Mapping[str, Any]] = parsed("Which checkpoints stay.", default=KeepConfig())
    log_every: PositiveInt = Field(default=10, description="Steps between records of the training metrics.")
    patience: PositiveInt | None = Field(
        default=None,
        description="Stop after this many evaluations (by evaluate_every) without improvement; never if unset.",
    )
    label_smoothing: Annotated[Probability, Traced()] = Field(
        default=0.0, description="Share of a target's probability that goes to all tokens of the vocabulary alike."
    )
    z_loss: Annotated[float, Field(ge=0.0), Traced()] = Field(
        default=0.0, description="Factor of log(Z)^2, which is added to a token's loss; Z is the softmax's denominator."
    )

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} microbatches")
        if self.patience is not None and self.evaluate_every is None:
            message = "patience counts evaluations, and there is none but the last one without train.evaluate_every"
            raise located(("patience",), self.patience, message)
        return self


class OptimizerConfig(Section):
    """AdamW and its schedule. The defaults are the paper's reference configuration (arXiv:2407.13906)."""

    learning_rate: Annotated[float, Field(gt=0), Traced()] = Field(
        default=1e-4, description="Learning rate at its peak, after the warm-up."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up, down to final_scale."
    )
    warmup: Annotated[Probability, Traced()] = Field(default=0.1, description="Share of all steps spent warming up.")
    final_scale: Annotated[float, Field(ge=0, le=1), Traced()] = Field(
        default=0.0, description="Learning rate at the end, as a share of the peak (cosine and linear)."
    )
    weight_decay: Annotated[float, Field(ge=0), Traced()] = Field(
        default=0.0,
        description="Share of a parameter, times the learning rate, that a step takes off it (AdamW).",
    )
    beta1: Annotated[Probability, Traced()] = Field(
        default=0.9, description="Share of the mean of gradients that a step keeps."
    )
    beta2: Annotated[Probability, Traced()] = Field(
        default=0.999, description="Share of the mean of squared gradients that a step keeps."
    )
    epsilon: Annotated[float, Field(gt=0), Traced()] = Field(
        default=1e-8, description="Added to the root of the mean of squared gradients, by which a step divides."
    )
    clip_norm: Annotated[float, Field(gt=0), Traced()] = Field(default=1.0, description="Largest global gradient norm.")


class RuleConfig(Section):
    """What every rule has: which parameters, and how fast they move."""

    match: str = Field(
        description="Path pattern: 'layers.*.attention.{q,v}', 'layers.{0..3}.**'; '*' is one part, '**' any number."
    )
    learning_rate_scale: Annotated[float, Field(ge=0), Traced()] = Field(
        default=1.0, description="Factor on optimizer.learning_rate for these parameters."
    )
    weight_decay: Annotated[float, Field(ge=0), Traced()] | None = Field(
        default=None, description="Share, as optimizer.weight_decay, which holds if this is unset."
    )


class FrozenRule(RuleConfig):
    """Parameters that do not change."""

    method: Literal["frozen"] = Field(default="frozen", description="These parameters do not change.")


class FullRule(RuleConfig):
    """Parameters that are trained themselves."""

    method: Literal["full"] = Field(default="full", description="These parameters are trained themselves.")


class LowRankRule(RuleConfig):
    """Linear layers that get a trained low-rank term (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732)."""

    method: Literal["low_rank"] = Field(
        default="low_rank", description="These linear layers get a trained low-rank term."
    )
    rank: Annotated[PositiveInt, Traced(capacity=True)] = Field(
        default=16, description="Rank of the term: columns of A and rows of B."
    )
    alpha: Annotated[float, Field(gt=0), Traced()] = Field(
        default=32.0, description="The term is scaled by alpha / rank, or as use_rslora says."
    )
    dropout: Annotated[Probability, Traced()] = Field(
        default=0.0, description="Share of the term's inputs that are left out of a training step."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")


Rule = Annotated[FrozenRule | FullRule | LowRankRule, Field(discriminator="method")]

REFERENCE_UPDATE = (LowRankRule(match="layers.*.attention.{q,v}", rank=16, alpha=32.0, dropout=0.1),)


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


class EvaluationConfig(Section):
    """The task metric, measured by generating answers."""

    task: Literal["none", "extraction"] = Field(
        default="none",
        description="'extraction' compares generated answers with the completions: exact match and F1. 'none' measures "
        "the loss alone.",
    )
    batch_size: PositiveInt = Field(default=32, description="Prompts that are answered at the same time.")
    max_new_tokens: PositiveInt = Field(default=32, description="Tokens after which an answer ends in any case.")
    stop: str | None = Field(
        default="\n",
        description="Generation of an answer ends here, and at the end tokens of model, tokenizer and chat template.",
    )
    limit: PositiveInt | None = Field(
        default=None, description="Evaluate on this many examples, the first ones; on all if unset."
    )


class DimensionConfig(Section):
    """One searched key: exactly one of the five kinds."""

    log_uniform: Parsed[tuple[float, float] | None, Sequence[float]] = parsed(
        "[low, high]: numbers between them, in equal ratios; unset: another kind.", default=None
    )
    uniform: Parsed[tuple[float, float] | None, Sequence[float]] = parsed(
        "[low, high]: numbers between them; unset: another kind.", default=None
    )
    integer: Parsed[tuple[int, int] | None, Sequence[int]] = parsed(
        "[low, high]: whole numbers from one to the other; unset: another kind.", default=None
    )
    power_of_two: Parsed[tuple[int, int] | None, Sequence[int]] = parsed(
        "[low, high]: numbers that are powers of two, from one to the other; unset: another kind.", default=None
    )
    choice: Parsed[list[Any] | None, Sequence[Any]] = parsed(
        "Two values or more, without an order; unset: another kind.", default=None
    )

    @model_validator(mode="after")
    def _one_kind(self) -> DimensionConfig:
        kinds = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        value = getattr(self, kinds[0])
        if kinds[0] == "choice":
            if len(value) < 2:
                raise ValueError("choice needs a list of at least two values")
            return self
        low, high = value
        if low >= high:
            raise ValueError(f"{kinds[0]} needs low < high, not [{low}, {high}]")
        if kinds[0] == "log_uniform" and low <= 0:
            raise ValueError(f"log_uniform needs positive bounds, not [{low}, {high}]")
        if kinds[0] == "power_of_two" and (low < 1 or low & (low - 1) or high & (high - 1)):
            raise ValueError(f"power_of_two needs powers of two, not [{low}, {high}]")
        return self

    @property
    def kind(self) -> str:
        """The name of the one field that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


class SearchConfig(Section):
    """The search: many trials for a fraction of their steps, the best finished (arXiv:2407.13906)."""

    space: Parsed[dict[str, DimensionConfig], Mapping[str, DimensionConfig | Mapping[str, Any]]] = parsed(
        "Dotted key -> what to try.", default_factory=dict
    )
    method: Literal["gp", "random", "tpe", "hyperband"] = Field(
        default="gp",
        description="What proposes trials: a Gaussian process, chance, or Optuna's TPE; hyperband is TPE that also "
        "stops trials before the fraction. tpe and hyperband need the extra optuna.",
    )
    trials: PositiveInt = Field(default=16, description="Configurations that are tried, the reference among them.")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="Share of its steps after which a trial is scored."
    )
    ladder: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=list,
        description="Shares of the steps before fraction, ascending: all trials are trained to the first, and the "
        "better half at each goes on: more trials for the same steps (docs/surrogates.md).",
    )
    promote: PositiveInt = Field(default=5, description="How many of the best trials are finished.")
    population: PositiveInt | Literal["auto"] = Field(
        default=1,
        description="Trials that train at the same time, in one compiled step on one copy of the base. 'auto': as many "
        "as the memory of a device holds, at most a quarter of the trials.",
    )
    initial: PositiveInt = Field(
        default=6, description="Trials of the space-filling design, before the surrogate proposes."
    )
    fixed: dict[str, Any] = Field(
        default_factory=dict, description="Searched keys that new trials do not vary any more -> their values."
    )
    start_from: UserPath | None = Field(
        default=None,
        description="Run directory of a study over the same keys, on another task, a part of the data or a smaller "
        "model: its best finished trials come first, in the places of the design (initial less the reference). If "
        "unset, the design is drawn.",
    )
    objective: Literal["loss", "exact_match", "f1"] = Field(
        default="loss", description="Validation loss, or a task metric."
    )
    seed: Seed = Field(default=0, description="Seed of the proposals; every trial trains with train.seed.")
    reference: Literal["own", "paper"] | dict[str, Any] = Field(
        default="own",
        description="Trial 0, which the others are compared with: 'own' is the configuration as it stands, 'paper' the "
        "values of arXiv:2407.13906; or a mapping of the dotted keys that differ from the configuration. A study that "
        "began when another one was the default keeps it.",
    )
    workers: PositiveInt = Field(
        default=1,
        description="Processes that train trials, on one machine or several, under Ray (extra 'distributed'); 1 trains "
        "in this process, unless ray_address is given.",
    )
    ray_address: str | None = Field(
        default=None, description="host:port of a running Ray's head node, or 'auto'; unset starts Ray on this machine."
    )
    worker_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="What each worker takes, by Ray's names: {GPU: 1}, {TPU: 4}; if empty a GPU where there is one, "
        "else a CPU core.",
    )

    @field_validator("reference", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        """One message for what is neither a name nor a mapping; an empty mapping leaves the configuration as it is."""
        if isinstance(value, dict):
            return value or "own"
        if value not in (names := ("own", "paper")):
            raise ValueError(
                f"{value!r} is no choice{nearest(value, names)}, or give a mapping of dotted keys to values"
            )
        return value

    @model_validator(mode="after")
    def _address(self) -> SearchConfig:
        if self.ray_address not in (None, "auto") and not re.fullmatch(r"[^:/\s]+:\d{1,5}", self.ray_address or ""):
            raise ValueError(f"ray_address is host:port or auto, not {self.ray_address}")
        return self

    @model_validator(mode="after")
    def _promotable(self) -> SearchConfig:
        if self.promote > self.trials:
            raise ValueError(f"promote {self.promote} is above trials {self.trials}")
        if list(self.ladder) != sorted(set(self.ladder)) or any(rung >= self.fraction for rung in self.ladder):
            raise ValueError(f"ladder {self.ladder} must ascend and stay below fraction {self.fraction}")
        if self.ladder and self.method == "hyperband":
            raise ValueError("ladder: method 'hyperband' has rungs of its own; choose another method, or no ladder")
        if self.start_from is not None and (places := min(self.initial, self.trials)) < 2:
            key = "initial" if self.initial == places else "trials"
            raise ValueError(
                f"start_from: with {key} {places} the first trial, the reference, leaves no place for a trial of "
                f"{self.start_from}; set {key} to 2 or more, or leave start_from out"
            )
        return self


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

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        max_length=LONGEST_NAME,
        description="Name of the run or study, and of its folder where run_dir is unset.",
    )
    run_dir: UserPath | None = Field(
        default=None,
        description="Default: runs/<name>. In the config.yaml of a run directory: that directory, wherever it is now.",
    )
    paths_from: Annotated[list[UserPath], BeforeValidator(_listed)] = Field(
        default_factory=list,
        description="Folders that the relative paths to model, data and earlier studies are meant from: the first that "
        "has them. If empty, the folder of the configuration's file, then the working directory; a run directory "
        "keeps them. Folders that are relative themselves are meant from that file.",
    )
    model: Parsed[ModelConfig, Mapping[str, Any]] = Field(description="The pretrained model.")
    data: Parsed[DataConfig, Mapping[str, Any]] = Field(description="Rows, and how they become text and batches.")
    train: Parsed[TrainConfig, Mapping[str, Any]] = Field(description="The training loop.")
    optimizer: Parsed[OptimizerConfig, Mapping[str, Any]] = parsed("AdamW and its schedule.", default=OptimizerConfig())
    update: Parsed[list[Rule], Sequence[Rule | Mapping[str, Any]]] = parsed(
        "What is trained: rules, the first that matches a parameter decides; by default a low-rank term of the "
        "queries and values (rank 16, alpha 32, dropout 0.1).",
        default_factory=lambda: list(REFERENCE_UPDATE),
        min_length=1,
    )
    parallel: Parsed[ParallelConfig, Mapping[str, Any]] = parsed("The device mesh.", default=ParallelConfig())
    kernels: Literal["auto", "xla", "pallas", "interpret"] = Field(
        default="auto",
        description="What computes products with adapters: the best for platform and shape, XLA, or the platform's own "
        "Pallas kernel (TPU, Hopper). 'interpret' runs that of TPUs anywhere, for tests, very slowly.",
    )
    evaluation: Parsed[EvaluationConfig, Mapping[str, Any]] = parsed(
        "The task metric, measured by generating answers.", default=EvaluationConfig()
    )
    search: Parsed[SearchConfig | None, Mapping[str, Any]] = parsed(
        "What `jaxtune search` tries; one configuration is trained if unset.", default=None
    )
    study: Parsed[StudiesConfig, Mapping[str, Any]] = parsed(
        "The experiments of `jaxtune study`.", default=StudiesConfig()
    )
    telemetry: Parsed[TelemetryConfig, Mapping[str, Any]] = parsed(
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
