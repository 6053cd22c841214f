"""Prompt templates with named fields."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.data.values import as_text
from jaxtune.errors import UserError, nearest


class Template:
    """Text with named fields: ``"{text}\\n{attribute}:"``.

    ``{{`` and ``}}`` are braces; ``{a.b}`` is field ``b`` of the mapping ``a`` unless a field is called ``a.b``. Text
    goes in as it is, any other value as JSON (:mod:`jaxtune.data.values`).
    """

    def __init__(self, text: str, *, key: str = "data.prompt"):
        """Reads a template.

        Args:
          text: the template.
          key: configuration key that error messages name.

        Raises:
          UserError: a brace is unbalanced or a field has no name.
        """
        self.key = key
        self.text = text
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, name, spec, conversion in string.Formatter().parse(text):
                if name is not None and (not name or spec or conversion):
                    raise UserError(
                        f"{key}: a field is a name in braces, like {{text}}; write {{{{ and }}}} for braces: {text!r}"
                    )
                self._parts.append((literal, name))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{key}: {error}; write {{{{ and }}}} for braces: {text!r}") from error

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in order of first use."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def render(self, row: Mapping[str, Any], where: Callable[[], str]) -> str:
        """The template filled with a row's fields.

        Args:
          row: the fields.
          where: says where the row stands; called for messages only.

        Raises:
          UserError: the row lacks a field, or it is null, or what it holds has no text (bytes that are no UTF-8).
        """
        return "".join(
            literal if name is None else literal + self._field(row, name, where) for literal, name in self._parts
        )

    def _field(self, row: Mapping[str, Any], name: str, where: Callable[[], str]) -> str:
        value: Any = row
        for part in [name] if name in row else name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                choices = value if isinstance(value, Mapping) else ()
                raise UserError(f"{self.key}: {where()} has no field {name!r}{nearest(part, choices)}")
            value = value[part]
        try:
            text = as_text(value)
        except ValueError as error:
            raise UserError(f"{self.key}: {where()}: field {name!r} holds {error}") from error
        if text is None:
            raise UserError(f"{self.key}: {where()}: field {name!r} is null")
        return text
