"""The traced hyperparameters, derived from the schema's :class:`~jaxtune.config.section.Traced` annotations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from jaxtune.config.roles import mark_of, marked, within
from jaxtune.config.schema import Config
from jaxtune.config.section import Compiled, HostOnly, Later, LoopOnly, Shared, Traced


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Any, Traced | None, Later | None]]:
    """Every leaf below ``node``: dotted key, value, and marks. The numbers of a traced mapping are leaves each."""
    if isinstance(node, BaseModel):
        for name, field in type(node).model_fields.items():
            value = getattr(node, name)
            key, marks = f"{prefix}{name}", (mark_of(field, Traced), mark_of(field, Later))
            if isinstance(value, BaseModel | list | tuple):
                yield from _walk(value, f"{key}.")
            elif isinstance(value, dict) and marks[0] is not None:
                yield from ((f"{key}.{inner}", number, *marks) for inner, number in value.items())
            else:
                yield key, value, *marks
    elif isinstance(node, list | tuple):
        for index, item in enumerate(node):
            if isinstance(item, BaseModel):
                yield from _walk(item, f"{prefix}{index}.")
            else:
                yield f"{prefix}{index}", item, None, None


def dotted(node: BaseModel) -> dict[str, Any]:
    """Every leaf of a configuration by its dotted key: ``{"update.0.rank": 16, …}``."""
    return {key: value for key, value, *_ in _walk(node, "")}


def hyperparameters(node: BaseModel | Sequence[BaseModel], prefix: str = "") -> dict[str, float]:
    """The numbers that the compiled step takes as arguments, by dotted key; keys that are unset (None) are left out.

    Args:
      node: a whole configuration, one section of it, or a list of rules.
      prefix: what the keys start with: ``"optimizer."`` for that section.
    """
    return {key: float(value) for key, value, mark, _ in _walk(node, prefix) if mark is not None and value is not None}


def capacities(node: BaseModel | Sequence[BaseModel], prefix: str = "") -> dict[str, int]:
    """The traced numbers that also bound a shape (ranks), by dotted key."""
    return {key: int(value) for key, value, mark, _ in _walk(node, prefix) if mark is not None and mark.capacity}


def program_key(config: Config) -> str:
    """Equal for two configurations exactly when one compiled training step serves both.

    It holds every key that steps are compiled for, but for those that are one for all of a process, and which optional
    traced keys are set.
    """
    compiled, apart = marked(Compiled), {**marked(LoopOnly), **marked(HostOnly), **marked(Shared)}
    parts = [
        f"{key}={'traced' if mark is not None and value is not None else repr(value)}"
        for key, value, mark, later in _walk(config, "")
        if within(key, compiled) and not within(key, apart) and (later is None or value != later.before)
    ]
    return "\n".join(parts)


def program_name(config: Config) -> str:
    """A short name of :func:`program_key`, by which a journal tells programs apart."""
    return hashlib.sha256(program_key(config).encode()).hexdigest()[:12]
