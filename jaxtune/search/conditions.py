"""Which searched keys apply only where another one has certain values: those of a method, or of an optimizer's kind.

Where ``update.0.method`` is searched, each choice is a rule with the keys of its own method. A searched key of the rule
that a method lacks does not apply to the trials of that method.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from pydantic import BaseModel

from jaxtune.config import Config, dotted, with_overrides
from jaxtune.config.loading import TAGS, section_of_kind, sections_at
from jaxtune.config.search_section import DimensionConfig
from jaxtune.errors import UserError, nearest

Conditions = Mapping[str, Mapping[str, tuple[Any, ...]]]
"""Of a searched key that does not always apply: by the key that it depends on, the values at which it does."""


def conditions_of(config: Config, space: Mapping[str, DimensionConfig]) -> tuple[set[str], Conditions]:
    """What keys there are, and when those of a space apply.

    Args:
      config: of the study.
      space: ``search.space``.

    Returns:
      Every dotted key that the configuration has with any choice, and the conditions.

    Raises:
      UserError: a choice is none, lacks a key that the configuration sets, or none has a key that is searched.
    """
    own = set(dotted(config))
    known, found = set(own), dict[str, dict[str, tuple[Any, ...]]]()
    for tag, dimension in space.items():
        parent, _, name = tag.rpartition(".")
        if name not in TAGS or tag not in own or dimension.choice is None:
            continue
        held = [(choice, _keys_with(config, tag, choice, space)) for choice in dimension.choice]
        known.update(*(keys for _, keys in held))
        for key in space:
            if not key.startswith(f"{parent}.") or key == tag:
                continue
            there = tuple(choice for choice, keys in held if key in keys)
            having = _having(key, dimension.choice[0])
            if not there and having:
                raise UserError(
                    f"search.space.{key}: no choice of search.space.{tag} has such a key; leave it out, or add a "
                    f"choice that has{having}"
                )
            if 0 < len(there) < len(held):
                found.setdefault(key, {})[tag] = there
    return known, found


def says_kind(configuration: Mapping[str, Any], key: str) -> bool:
    """Whether a trial says itself of which kind the section of a key is: what it lacks of it does not apply then."""
    parent = key.rpartition(".")[0]
    return any(f"{parent}.{tag}" in configuration for tag in TAGS)


def filled(values: Mapping[str, Any], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's configuration, with the study's own values of searched keys that it does not override."""
    own = {key: value for key, value in values.items() if not says_kind(configuration, key)}
    return {**own, **configuration}


def _keys_with(config: Config, tag: str, choice: Any, space: Container[str]) -> set[str]:
    """The dotted keys of the configuration where a section is of another kind, which has what is set, not searched."""
    parent = tag.rpartition(".")[0]
    section = _section(config, parent)
    kind = section_of_kind(sections_at(parent.split(".")), choice)
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        there = kind is None or name in kind.model_fields or f"{parent}.{name}" in space
        if not there and value != field.default:
            raise UserError(
                f"search.space.{tag}: {choice!r} has no key {name!r}, which {parent} sets to {value!r}; leave that "
                f"out, or the choice{_having(f'{parent}.{name}', choice)}"
            )
    return set(dotted(with_overrides(config, {tag: choice}, origin=f"search.space.{tag}: ")))


def _section(config: Config, key: str) -> BaseModel:
    section: Any = config
    for part in key.split("."):
        section = section[int(part)] if isinstance(section, list | tuple) else getattr(section, part)
    return section


def _having(key: str, choice: Any) -> str:
    """Which kinds have a key, the nearest to a choice first, for a message."""
    parent, _, name = key.rpartition(".")
    having = [one for one in sections_at(parent.split(".")) if name in one.model_fields]
    kinds = [str(one.model_fields[tag].default) for one in having for tag in TAGS if tag in one.model_fields]
    return nearest(choice, kinds)
