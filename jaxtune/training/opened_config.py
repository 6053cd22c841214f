"""What a configuration names, opened: the model on its mesh, the tokenizer, the examples of each split.

A run opens it once; a study opens it once for all of its trials.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np

from jaxtune.config import Config, with_overrides
from jaxtune.config.data_section import DataConfig, SourceConfig
from jaxtune.config.paths import check_there, located
from jaxtune.config.update_rules import virtual_tokens
from jaxtune.data import (
    BatchIterator,
    Example,
    evaluation_batches,
    fingerprint,
    make_examples,
    open_source,
    steps_of_epochs,
    train_batches,
)
from jaxtune.data.examples import fronted
from jaxtune.data.pipeline import permutation
from jaxtune.data.template_date import dated
from jaxtune.errors import UserError
from jaxtune.evaluation.evaluator import Evaluator, answer_generator
from jaxtune.evaluation.generation import Generator
from jaxtune.models import Decoder, load_model, load_tokenizer, random_model, read_config
from jaxtune.models.tokenizer import name_end_token
from jaxtune.parallel import make_mesh
from jaxtune.parallel.platform import compute_dtype
from jaxtune.training.adapter_start import load_start, with_adapter
from jaxtune.training.model_directory import model_directory
from jaxtune.training.template_date import with_date
from jaxtune.training.trainer import Trainer
from jaxtune.updates import UpdatePlan

logger = logging.getLogger(__name__)

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


class OpenedConfig:
    """An opened configuration.

    Args:
      config: as read.
      parts: the splits to open; those the configuration does not name are left out.

    Attributes:
      given: the configuration as read.
      config: resolved: ``train.steps`` is set, ``train.epochs`` is not.
      model: the base, on the configured mesh.
      start: the arrays of ``model.adapter``, which training starts from; None without one.
      tokenizer: of the model.
      examples: the examples of each opened split.
      fingerprints: of each opened split, by its configuration key.
      data_changed: the training examples were others at the beginning of what goes on, and that is accepted: batches
        continue from positions among those.

    Raises:
      UserError: a file, a key or the data is wrong.
    """

    def __init__(self, config: Config, parts: Sequence[Part] = PARTS):
        # The cheap checks come first: a wrong mesh should not wait for gigabytes of weights.
        mesh = make_mesh(**config.parallel.model_dump())
        check_there(config, "model")
        _check_context(config)
        config = with_date(with_adapter(config))
        self.tokenizer: Any = _tokenizer(config)
        _check_end(self.tokenizer, config)
        self.examples = _open_splits(config, self.tokenizer, parts)
        self.fingerprints = _fingerprints(self.examples)
        self.data_changed = False
        self.given = config
        self.config = self.resolve(config)
        self.model = _load(config, mesh)
        self.start = load_start(config, self.model)
        _check_vocabulary(self.examples, self.model.config.vocab_size)

    def resolve(self, config: Config) -> Config:
        """A variant of the configuration with ``train.epochs`` turned into the steps that its batches make of them.

        Raises:
          UserError: its rows are longer than the model was made for.
        """
        _check_context(config)
        if config.train.epochs is None or "train" not in self.examples:
            return config
        steps = steps_of_epochs(
            fronted(self.examples["train"], virtual_tokens(config.update)),
            config.train.epochs,
            batch_size=config.train.batch_size,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            packing=config.data.packing,
        )
        return with_overrides(config, {"train.steps": steps, "train.epochs": None})

    def check_lengths(self, config: Config) -> None:
        """Whether every training example fits a row of a variant of the configuration.

        Raises:
          UserError: one is longer.
        """
        longest = max(len(example.tokens) - 1 for example in self.examples["train"]) + virtual_tokens(config.update)
        if longest > config.train.sequence_length:
            raise UserError(
                f"train.sequence_length: {config.train.sequence_length} is less than the longest example's {longest}"
            )

    def trainer(
        self, config: Config | None = None, *, capacity: Mapping[str, int] | None = None, dropout: bool | None = None
    ) -> Trainer:
        """A trainer for this configuration, or for a variant of it over the same model and data.

        Raises:
          UserError: its batch or its rules do not fit, or it needs other positions in front of each document.
        """
        config = config or self.config
        fronts = [virtual_tokens(each.update) for each in (self.config, config)]
        if fronts[0] != fronts[1]:
            raise UserError(
                f"update: {fronts[1]} positions are wanted in front of each document, and rows of validation are laid "
                f"out with {fronts[0]}; give all trials the same length"
            )
        return Trainer(
            self.model,
            UpdatePlan(config.update),
            config.train,
            config.optimizer,
            capacity=capacity,
            dropout=dropout,
            remat=config.model.remat,
            kernels=config.kernels,
            start=None if self.start is None else self.start.trainable,
            start_fixed=None if self.start is None else self.start.fixed,
        )

    def batches(self, config: Config | None = None) -> BatchIterator:
        """Endless training batches; their order follows from ``train.seed`` alone."""
        config = config or self.config
        return train_batches(
            fronted(self.examples["train"], virtual_tokens(config.update)),
            batch_size=config.train.batch_size,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            packing=config.data.packing,
            examples_may_change=self.data_changed,
        )

    @cached_property
    def validation_batches(self) -> Sequence[Mapping[str, np.ndarray]] | None:
        """Every validation example once, in fixed shapes; None without a validation split."""
        return self.loss_batches("validation")

    def loss_batches(self, part: Part) -> Sequence[Mapping[str, np.ndarray]] | None:
        """Every example of a split once, in the training batch's shape; None where the split is not configured."""
        if part not in self.examples:
            return None
        return evaluation_batches(
            fronted(self.examples[part], virtual_tokens(self.config.update)),
            batch_size=self.config.train.batch_size,
            sequence_length=self.config.train.sequence_length,
            packing=self.config.data.packing,
        )

    @cached_property
    def generator(self) -> Generator:
        """Greedy generation for task metrics, compiled once for all trials."""
        return answer_generator(self.model, self.tokenizer, self.config.evaluation)

    def evaluator(self, part: Part) -> Evaluator | None:
        """Generates and scores the answers of a split; None without a task or without the split."""
        if part not in self.examples or self.config.evaluation.task == "none":
            return None
        return Evaluator(
            self.examples[part],
            self.generator,
            self.tokenizer,
            self.config.evaluation,
            explode=self.config.data.explode,
            key=f"data.{part}",
        )


def read_fingerprints(config: Config) -> dict[str, dict[str, Any]]:
    """The fingerprints of all splits of a configuration, by their keys; opens no model.

    Raises:
      UserError: the tokenizer or the data is wrong.
    """
    return _fingerprints(read_examples(config))


def read_examples(config: Config, parts: Sequence[Part] = PARTS) -> dict[Part, Sequence[Example]]:
    """The examples of those splits that a configuration names; opens no model.

    Raises:
      UserError: the tokenizer or the data is wrong.
    """
    config = with_date(config)
    return _open_splits(config, _tokenizer(config), parts)


def _tokenizer(config: Config) -> Any:
    return dated(load_tokenizer(*located(config).model.tokenizer_source), config.data.date)


def _open_splits(config: Config, tokenizer: Any, parts: Sequence[Part]) -> dict[Part, Sequence[Example]]:
    """The examples of those splits that the configuration names."""
    opened: dict[Part, Sequence[Example]] = {}
    data = located(config).data
    for part in parts:
        key, source = f"data.{part}", getattr(data, part)
        if source is not None:
            check_there(config, key)
            check_there(config, "data.explode")
            rows, front = open_source(source, key=key), virtual_tokens(config.update)
            length = config.train.sequence_length - front
            if length < 1:
                raise UserError(
                    f"train.sequence_length: {config.train.sequence_length} leaves no room behind the {front} "
                    "positions in front of each document that are a method's own"
                )
            examples = make_examples(rows, data, tokenizer, sequence_length=length, key=key)
            opened[part] = _chosen(examples, source, data, key)
    return opened


def _chosen(examples: Sequence[Example], source: SourceConfig, data: DataConfig, key: str) -> Sequence[Example]:
    """The first ``source.examples`` of a shuffle, which are among those of every larger number; without absent answers.

    Raises:
      UserError: there are not so many, or none is left.
    """
    chosen = examples
    if source.examples is not None:
        if source.examples > len(examples):
            raise UserError(f"{key}.examples: {source.examples} is above the {len(examples)} examples of the source")
        order = permutation(len(examples), f"examples/{source.examples_seed}")
        chosen = [examples[place] for place in order[: source.examples]]
    if source.absent:
        return chosen
    if data.explode is None:
        raise UserError(f"{key}.absent: nothing tells which answers are absent without data.explode")
    name, absent = data.explode.value, data.explode.absent
    present = [example for example in chosen if str(example.fields[name]) != absent]
    if not present:
        raise UserError(f"{key}.absent: none of the {len(chosen)} examples has an answer; set it to true")
    return present


def _fingerprints(splits: Mapping[Part, Sequence[Example]]) -> dict[str, dict[str, Any]]:
    return {f"data.{part}": fingerprint(examples) for part, examples in splits.items()}


def _load(config: Config, mesh: jax.sharding.Mesh) -> Decoder:
    dtype = compute_dtype(config.model.dtype, mesh)
    if config.model.initialize == "random":
        decoder = read_config(model_directory(config))
        return random_model(decoder, jax.random.key(config.train.seed), mesh, dtype=dtype)
    model = located(config).model
    return load_model(model.path, mesh, dtype=dtype, revision=model.revision, quantize=model.quantize)


def _check_vocabulary(examples: Mapping[Part, Sequence[Example]], vocabulary: int) -> None:
    """Refuses token ids that the model has no row for, which a gather on a device would clip without a word."""
    for part, each in examples.items():
        largest = max(int(example.tokens.max()) for example in each)
        if largest >= vocabulary:
            raise UserError(
                f"model.tokenizer: gives token id {largest} in data.{part}, but the model's vocabulary has "
                f"{vocabulary} tokens; it belongs to another model"
            )


def _check_end(tokenizer: Any, config: Config) -> None:
    """Finds a token to end completions with, where the tokenizer has none of its own, or says that nothing does."""
    if tokenizer.eos_token is None:
        name_end_token(tokenizer, model_directory(config))
    if tokenizer.eos_token is None and not config.data.templated:
        logger.warning(
            "neither the tokenizer nor config.json names an end-of-text token, so nothing ends a completion: an answer "
            "is generated up to evaluation.stop or evaluation.max_new_tokens"
        )


def _check_context(config: Config) -> None:
    """Refuses rows longer than the model was made for."""
    limit = read_config(model_directory(config)).max_position_embeddings
    if config.train.sequence_length > limit:
        raise UserError(
            f"train.sequence_length: {config.train.sequence_length} is above the model's context of {limit} positions"
        )
