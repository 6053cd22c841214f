"""The traced hyperparameters, derived from the schema's :class:`~jaxtune.config.section.Traced` annotations."""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxtune.config.schema import Config
from jaxtune.config.section import Traced

HOST_KEYS = ("train.checkpoint_minutes", "train.keep")
"""Keys, and sections, that only say what is kept of a run: they decide no program and no result, and may change at any
time."""


def without_host_keys(nested: Mapping[str, Any]) -> dict[str, Any]:
    """A nested configuration, or a part of one, without :data:`HOST_KEYS`."""
    left = dict(nested)
    for section, name in (key.split(".") for key in HOST_KEYS):
        if isinstance(left.get(section), Mapping):
            left[section] = {key: value for key, value in left[section].items() if key != name}
    return left


def _marker(annotation: Any) -> Traced | None:
    """The mark inside a type such as ``Annotated[float, Traced()] | None``."""
    for argument in typing.get_args(annotation):
        if isinstance(argument, Traced):
            return argument
        if (found := _marker(argument)) is not None:
            return found
    return None


def field_marker(field: FieldInfo) -> Traced | None:
    """The mark of a field, wherever in its type it stands."""
    marked = next((mark for mark in field.metadata if isinstance(mark, Traced)), None)
    return marked or _marker(field.annotation)


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Any, Traced | None]]:
    """Every leaf below ``node``: dotted key, value, mark."""
    if isinstance(node, BaseModel):
        for name, field in type(node).model_fields.items():
            value = getattr(node, name)
            key = f"{prefix}{name}"
            if isinstance(value, BaseModel | list | tuple):
                yield from _walk(value, f"{key}.")
            else:
                yield key, value, field_marker(field)
    elif isinstance(node, list | tuple):
        for index, item in enumerate(node):
            if isinstance(item, BaseModel):
                yield from _walk(item, f"{prefix}{index}.")
            else:
                yield f"{prefix}{index}", item, None


def dotted(node: BaseModel) -> dict[str, Any]:
    """Every leaf of a configuration by its dotted key: ``{"update.0.rank": 16, …}``."""
    return {key: value for key, value, _ in _walk(node, "")}


def hyperparameters(node: BaseModel | Sequence[BaseModel], prefix: str = "") -> dict[str, float]:
    """The numbers that the compiled step takes as arguments, by dotted key; keys that are unset (None) are left out.

    Args:
      node: a whole configuration, one section of it, or a list of rules.
      prefix: what the keys start with: ``"optimizer."`` for that section.
    """
    return {key: float(value) for key, value, mark in _walk(node, prefix) if mark is not None and value is not None}


def capacities(node: BaseModel | Sequence[BaseModel], prefix: str = "") -> dict[str, int]:
    """The traced numbers that also bound a shape (ranks), by dotted key."""
    return {key: int(value) for key, value, mark in _walk(node, prefix) if mark is not None and mark.capacity}


def program_key(config: Config) -> str:
    """Equal for two configurations exactly when one compiled training step serves both.

    It holds every key that is not traced, and which optional traced keys are set; what only names or reports a run is
    left out.
    """
    sections = ("model", "train", "optimizer", "update", "parallel", "data")
    untouched = {"train.seed", "train.log_every", "train.evaluate_every", "train.checkpoint_every", "train.patience"}
    parts = [
        f"{key}={'traced' if mark is not None and value is not None else repr(value)}"
        for key, value, mark in _walk(config, "")
        if key.split(".")[0] in sections and key not in untouched and not key.startswith(HOST_KEYS)
    ]
    return "\n".join(parts)


def program_name(config: Config) -> str:
    """A short name of :func:`program_key`, by which a journal tells programs apart."""
    return hashlib.sha256(program_key(config).encode()).hexdigest()[:12]
