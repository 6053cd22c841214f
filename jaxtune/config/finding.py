"""Things of one kind, each in a file of its own, found by name without a list of them.

A name is that of a file in one of the package's folders, that of an entry point of another package, or
``module:Name``, which needs no installation.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from jaxtune.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Finder(Generic[T]):
    """The classes of one kind by their names.

    Attributes:
      what: the kind is called, in messages: ``optimizer``.
      package: whose files hold one class each, ``jaxtune.training.optimizers``; a file without one is passed over, the
        others' names are those of their classes.
      group: of the entry points that name classes of other packages, ``jaxtune.optimizers``.
      base: what all of them derive from, imported where it is first needed.
      suits: whether a class that derives from it has what names it; one without is for others to derive from.
    """

    what: str
    package: str
    group: str
    base: Callable[[], type[T]]
    suits: Callable[[type[T]], bool] = lambda _: True

    @functools.cached_property
    def builtin(self) -> Mapping[str, type[T]]:
        """The package's own by name, in the order of the alphabet."""
        folder = importlib.import_module(self.package).__path__
        names = sorted(module.name for module in pkgutil.iter_modules(folder))
        return {name: found for name in names for found in self._declared(name)}

    def names(self) -> list[str]:
        """Every name but ``module:Name``, those of other packages last; nothing of these is imported."""
        entries = importlib.metadata.entry_points(group=self.group)
        return list(dict.fromkeys([*self.builtin, *sorted(entries.names)]))

    def find(self, name: str) -> type[T] | None:
        """The class of a name; None where there is no such name.

        Args:
          name: of a file of the package, of an entry point, or ``module:Name``.

        Raises:
          UserError: what was named cannot be imported, or is of another kind.
        """
        if name in self.builtin:
            return self.builtin[name]
        if entries := tuple(importlib.metadata.entry_points(group=self.group, name=name)):
            return self._checked(name, entries[0].load, f"the entry point {entries[0].value}")
        module, separator, attributes = name.partition(":")
        if not separator:
            return None

        def load() -> Any:
            return functools.reduce(getattr, attributes.split("."), importlib.import_module(module))

        return self._checked(name, load, "it")

    def _checked(self, name: str, load: Callable[[], Any], where: str) -> type[T]:
        try:
            found = load()
        # Whatever the module of another package raises while it is imported.
        except Exception as error:
            raise UserError(f"{self.what} {name!r}: {where} cannot be imported ({error!r})") from error
        if not self._is_one(found):
            base = self.base()
            raise UserError(
                f"{self.what} {name!r}: {where} is no {base.__name__} ({base.__module__}) that can be named"
            )
        return found

    def _declared(self, name: str) -> Iterator[type[T]]:
        module = importlib.import_module(f"{self.package}.{name}")
        here = (value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__)
        yield from (value for value in here if self._is_one(value))

    def _is_one(self, value: Any) -> bool:
        base = self.base()
        return isinstance(value, type) and value is not base and issubclass(value, base) and self.suits(value)
