"""The ``data`` section: where rows come from, and how they become text."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from jaxtune.config.section import (
    LocalPath,
    LoopOnly,
    Parsed,
    PerTrial,
    PositiveInt,
    Section,
    Seed,
    located,
    parsed,
)


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
    examples: Annotated[PositiveInt | None, LoopOnly()] = Field(
        default=None,
        description="Keep this many examples, of which an exploded row gives several: the first of a shuffle; all if "
        "unset.",
    )
    examples_seed: Annotated[Seed, LoopOnly()] = Field(
        default=0, description="Seed of that shuffle: another one keeps other examples."
    )
    absent: Annotated[bool, LoopOnly()] = Field(
        default=True,
        description="Whether questions to which a row has no answer (data.explode.absent) are kept; false leaves them "
        "out of what examples has kept.",
    )
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
    packing: Annotated[bool, PerTrial()] = Field(
        default=True, description="Several examples in a row; they never see each other."
    )
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
