"""The update methods, one file each, and how one is found by the name that a rule gives as its ``method``.

A method is a :class:`~jaxtune.updates.treatments.base.Treatment` with its own ``Section``. One of the package stands in
a file of this folder; others are found by an entry point of the group ``jaxtune.treatments``, whose name is the
method's, or as ``module:Name``, which needs no installation. Nothing here, nor in the files, imports jax by itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model

# The sections of this folder and the configuration, which lists them, import each other: it comes first.
import jaxtune.config  # noqa: F401
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from jaxtune.config.rule import RuleConfig
    from jaxtune.updates.treatments.base import Treatment

GROUP = "jaxtune.treatments"
"""The group of entry points."""


@functools.cache
def own() -> dict[str, type[Treatment]]:
    """The package's methods by name."""
    found = [treatment for module in pkgutil.iter_modules(__path__) for treatment in _declared(module.name)]
    return {_name(treatment): treatment for treatment in found}


def _declared(name: str) -> Iterator[type[Treatment]]:
    """The methods of one file: the treatments that it gives a section."""
    from jaxtune.updates.treatments.base import Treatment

    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        here = isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, Treatment)
        if here and "Section" in vars(value) and value is not Treatment:
            yield value


@functools.cache
def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Methods of other packages by name; nothing of them is imported yet."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def names() -> list[str]:
    """What a rule can give as its method, apart from ``module:Name``."""
    return [*own(), *(name for name in installed() if name not in own())]


def known() -> list[type[Treatment]]:
    """The package's methods, installed ones, and those by ``module:Name`` that a rule of this process has named."""
    return [*(found for name in names() if (found := find(name)) is not None), *_elsewhere.values()]


_elsewhere: dict[str, type[Treatment]] = {}


@functools.cache
def find(method: str) -> type[Treatment] | None:
    """The treatment of a method; None where there is no such name.

    Raises:
      UserError: what was named cannot be imported, or is no treatment.
    """
    if method in own():
        return own()[method]
    if method in installed():
        entry = installed()[method]
        return _checked(method, entry.load, f"the entry point {entry.value}")
    module, separator, name = method.partition(":")
    if not separator:
        return None
    return _elsewhere.setdefault(method, _checked(method, lambda: getattr(importlib.import_module(module), name), "it"))


def _checked(method: str, load: Any, what: str) -> type[Treatment]:
    from jaxtune.updates.treatments.base import Treatment

    try:
        found = load()
    except Exception as error:
        raise UserError(f"method {method!r}: {what} cannot be imported ({error!r})") from error
    if not (isinstance(found, type) and issubclass(found, Treatment) and "method" in found.Section.model_fields):
        raise UserError(f"method {method!r}: {what} is no Treatment with a Section (jaxtune.updates.treatments.base)")
    if _name(found) == method:
        return found
    # Found by where it stands, a rule goes on to call it so: that is what finds it again.
    section = _called(found.Section, method)
    return type(found.__name__, (found,), {"Section": section, "store": method, "__doc__": found.__doc__})


def _called(section: type[RuleConfig], method: str) -> type[RuleConfig]:
    """A section whose method has another name."""
    described = section.model_fields["method"].description
    fields: dict[str, Any] = {"method": (Literal[method], Field(default=method, description=described))}
    return create_model(section.__name__, __base__=section, **fields)


def _name(treatment: type[Treatment]) -> str:
    return treatment.Section.model_fields["method"].default
