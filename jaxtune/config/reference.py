"""The reference of all configuration keys, written from the schema: ``python -m jaxtune.config.reference``."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxtune.config.data_section import DataConfig, ExplodeConfig, SourceConfig
from jaxtune.config.hyperparameters import field_marker
from jaxtune.config.schema import Config, EvaluationConfig, ModelConfig, TelemetryConfig
from jaxtune.config.search_section import DimensionConfig, SearchConfig
from jaxtune.config.section import default_text
from jaxtune.config.studies import AblationConfig, DataSizeConfig, EarlyScoreConfig, StudiesConfig, TransferConfig
from jaxtune.config.training_sections import KeepConfig, OptimizerConfig, ParallelConfig, TrainConfig
from jaxtune.config.update_rules import FrozenRule, FullRule, LowRankRule

_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("", Config),
    ("model", ModelConfig),
    ("data", DataConfig),
    ("data.train, data.validation, data.test", SourceConfig),
    ("data.explode", ExplodeConfig),
    ("train", TrainConfig),
    ("train.keep", KeepConfig),
    ("optimizer", OptimizerConfig),
    ("update: a list of rules, the first that matches decides; method: low_rank", LowRankRule),
    ("update, method: full", FullRule),
    ("update, method: frozen", FrozenRule),
    ("parallel", ParallelConfig),
    ("evaluation", EvaluationConfig),
    ("search", SearchConfig),
    ("search.space.<key>", DimensionConfig),
    ("study: read by `jaxtune study`", StudiesConfig),
    ("study.early_score", EarlyScoreConfig),
    ("study.data_size", DataSizeConfig),
    ("study.transfer", TransferConfig),
    ("study.ablation", AblationConfig),
    ("telemetry", TelemetryConfig),
)


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(item) for item in arguments if item is not types.NoneType))
    if origin in (list, tuple, dict):
        return origin.__name__
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), "any"
    )


def _default(field: FieldInfo) -> str:
    text = default_text(field)
    return text if text in ("required", "", "see below") else f"`{text}`"


def table(section: type[BaseModel]) -> list[str]:
    """The rows of a section's keys: name, type, default and meaning."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        traced = "*traced* " if field_marker(field) else ""
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        cells = (f"`{name}`", f"{traced}{_type(field.annotation)}", _default(field), meaning)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown() -> str:
    """The page, as text."""
    lines = [
        "# Configuration keys",
        "",
        "Written from the schema by `python -m jaxtune.config.reference`. A number marked *traced* can change without",
        "a new compilation, so a search over it compiles once.",
        "",
        "On the command line a key is dotted: `train.steps=3`, `update.0.rank=8`, `search.space.update.0.rank={choice: "
        "[4, 8]}`. A",
        "mapping given for a section changes the keys that it names and leaves the others: `train={steps: 3, keep: "
        "{latest: 5}}`. A",
        "value is replaced: a list, a mapping with keys of your own (`search.space={…}`), a rule that names its method",
        "(`update.0={match: lm_head, method: full}`). `search=null search={…}` starts a section anew.",
    ]
    for title, section in _SECTIONS:
        heading = f"`{title}`" if title and " " not in title else title or "Top level"
        summary = (inspect.getdoc(section) or "").splitlines()[0]
        lines += ["", f"## {heading}", "", summary, "", *table(section)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
