"""Lists of keys, derived from the marks in the schema (:class:`~jaxtune.config.section.Role`)."""

from __future__ import annotations

import functools
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxtune.config.aliases import sections_of
from jaxtune.config.schema import Config
from jaxtune.config.section import Role

Mark = TypeVar("Mark", bound=Role)


def mark_of(field: FieldInfo, role: type[Mark]) -> Mark | None:
    """The mark of a role on a field, wherever in its type it stands; None where there is none."""
    marked = next((mark for mark in field.metadata if isinstance(mark, role)), None)
    return marked or _mark_in(field.annotation, role)


def _mark_in(annotation: Any, role: type[Mark]) -> Mark | None:
    """The mark inside a type such as ``Annotated[float, Traced()] | None``."""
    for argument in typing.get_args(annotation):
        if isinstance(argument, role):
            return argument
        if (found := _mark_in(argument, role)) is not None:
            return found
    return None


@functools.cache
def marked(role: type[Mark], section: type[BaseModel] = Config) -> Mapping[str, Mark]:
    """The dotted keys that bear the mark of a role, as they bear it: a section stands for all of its keys.

    Args:
      role: of the keys.
      section: where to look; keys start below it. Keys of lists' entries are not among them.

    Returns:
      Key -> mark; sections and keys at the top first, in the schema's order.
    """
    found = {key: mark for key, field in _fields(section, "") if (mark := mark_of(field, role)) is not None}
    return {key: found[key] for key in sorted(found, key=lambda key: key.count("."))}


def within(key: str, keys: Collection[str]) -> bool:
    """Whether a dotted key is one of some, or lies in a section among them."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def without(nested: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A nested configuration that lacks some dotted keys."""
    inner: dict[str, list[str]] = {}
    for first, _, rest in (key.partition(".") for key in keys):
        inner.setdefault(first, []).append(rest)
    return {
        name: without(value, inner[name]) if name in inner and isinstance(value, Mapping) else value
        for name, value in nested.items()
        if "" not in inner.get(name, ())
    }


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        for inner in sections_of(field.annotation):
            yield from _fields(inner, f"{prefix}{name}.")
