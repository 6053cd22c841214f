"""Sections of one key that are chosen by name, each in a file of its own that nothing else has to know of.

A name is that of a file in one of the package's folders, that of an entry point of another package, or
``module:Name``. The file holds the section, and what it stands for beside it; it imports jax where that is built, so
that reading a configuration does not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from jaxtune.config.section import Section, located
from jaxtune.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The sections that one key can hold, told apart by their key ``kind``.

    Attributes:
      key: of the configuration, ``optimizer``.
      package: whose files hold one section each, ``jaxtune.training.optimizers``; the files' names are the kinds'.
      group: of entry points that name sections of other packages, ``jaxtune.optimizers``.
      base: what all of them derive from.
      default: the kind where none is named.
    """

    key: str
    package: str
    group: str
    base: type[Section]
    default: str

    @functools.cached_property
    def builtin(self) -> Mapping[str, type[Section]]:
        """The sections in the package's files by their kinds, the default one first."""
        folder = importlib.import_module(self.package).__path__
        names = sorted(module.name for module in pkgutil.iter_modules(folder))
        names.sort(key=lambda name: name != self.default)
        return {name: self._in_module(name) for name in names}

    def names(self) -> list[str]:
        """Every kind with a name of its own, those of other packages last."""
        entries = importlib.metadata.entry_points(group=self.group)
        return list(dict.fromkeys([*self.builtin, *sorted(entries.names)]))

    def find(self, name: str) -> type[Section]:
        """The section of a kind.

        Args:
          name: of a file of the package, of an entry point, or ``module:Name``.

        Raises:
          UserError: there is none of that name, or it is no section for this key.
        """
        if name in self.builtin:
            return self.builtin[name]
        try:
            if entries := tuple(importlib.metadata.entry_points(group=self.group, name=name)):
                found = entries[0].load()
            elif ":" in name:
                module, _, attribute = name.partition(":")
                found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
            else:
                raise UserError(f"there is no {self.key} {name!r}{nearest(name, self.names())}")
        except (ImportError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{name!r} cannot be imported: {error}") from error
        if not (inspect.isclass(found) and issubclass(found, self.base)):
            raise UserError(f"{name!r} is no {self.base.__name__}, which a section for {self.key} derives from")
        return found

    def parse(self, value: Any) -> Any:
        """A mapping as the section of its kind; anything else as it is.

        Raises:
          ValidationError: there is no such kind, or a key is another kind's.
        """
        if not isinstance(value, Mapping):
            return value
        kind = value.get("kind", self.default)
        try:
            section = self.find(kind) if isinstance(kind, str) else self.base
        except UserError as error:
            raise located(("kind",), kind, str(error)) from error
        for name in value:
            others = [other for other, each in self.builtin.items() if name in each.model_fields]
            if name not in section.model_fields and others:
                near = nearest(name, section.model_fields)
                raise located((str(name),), value[name], f"{kind} has no such key, {' and '.join(others)} has{near}")
        return section.model_validate(dict(value))

    def _in_module(self, name: str) -> type[Section]:
        module = importlib.import_module(f"{self.package}.{name}")
        return next(
            item
            for item in vars(module).values()
            if inspect.isclass(item) and issubclass(item, self.base) and item.__module__ == module.__name__
        )
