"""The reference of all configuration keys, written from the schema: ``python -m jaxtune.config.reference``."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxtune.config.aliases import sections_of
from jaxtune.config.roles import mark_of
from jaxtune.config.schema import Config
from jaxtune.config.section import Traced, default_text


def sections(section: type[BaseModel] = Config, key: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Where each section stands, and the section, in the schema's order; those of one type stand together.

    Args:
      section: what to begin with.
      key: where that stands.
    """
    yield key, section
    places: dict[type[BaseModel], list[str]] = {}
    for name, field in section.model_fields.items():
        for below, inner in _inner(field.annotation):
            places.setdefault(inner, []).append(f"{key}.{name}{below}".lstrip("."))
    for inner, keys in places.items():
        yield from sections(inner, ", ".join(keys))


def _inner(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections in a key's type, and where they stand below the key."""
    found = sections_of(annotation)
    kinds = [f", kind: {section.model_fields['kind'].default}" if len(found) > 1 else "" for section in found]
    yield from zip(kinds, found, strict=True)
    for argument in (annotation, *typing.get_args(annotation)):
        held = [section for each in typing.get_args(argument) for section in sections_of(each)]
        if typing.get_origin(argument) is dict:
            yield from ((".<key>", section) for section in held)
        elif typing.get_origin(argument) is list:
            yield from ((f", method: {section.model_fields['method'].default}", section) for section in held)


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
        traced = "*traced* " if mark_of(field, Traced) else ""
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
    for title, section in sections():
        heading = f"`{title}`" if title and " " not in title else title or "Top level"
        summary = (inspect.getdoc(section) or "").splitlines()[0]
        lines += ["", f"## {heading}", "", summary, "", *table(section)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
