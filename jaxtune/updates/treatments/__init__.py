"""The update methods, one file each, and how one is found by the name that a rule gives as its ``method``.

A method is a :class:`~jaxtune.updates.treatments.base.Treatment` with its own ``Section``. One of the package stands in
a file of this folder; others are found by an entry point of the group ``jaxtune.treatments``, whose name is the
method's, or as ``module:Name``, which needs no installation. Nothing here, nor in the files, imports jax by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model

# The sections of this folder and the configuration, which lists them, import each other: it comes first.
import jaxtune.config  # noqa: F401
from jaxtune.config.finding import Finder

if TYPE_CHECKING:
    from jaxtune.config.rule import RuleConfig
    from jaxtune.updates.treatments.base import Treatment


def _base() -> type[Treatment]:
    from jaxtune.updates.treatments.base import Treatment

    return Treatment


def _has_a_section(treatment: type[Treatment]) -> bool:
    return "Section" in vars(treatment) and "method" in treatment.Section.model_fields


INSTEAD = {
    "prefix_tuning": "keys and values in front of every layer's own take room in each row, and cannot be merged; train "
    "low_rank on layers.*.attention.{k,v}, which changes the same keys and values and merges into the weights",
    "p_tuning": "the network that makes its soft prompt is of no use outside of training; train low_rank on "
    "layers.*.attention.*, or trainable_tokens on tokens of the prompt's template",
}
"""Methods of PEFT that are refused by name, as methods of rules and as adapters, and what to use in their place."""

_METHODS = Finder("method", __name__, "jaxtune.treatments", _base, _has_a_section)
_elsewhere: dict[str, type[Treatment]] = {}


def own() -> Mapping[str, type[Treatment]]:
    """The package's methods by name."""
    return _METHODS.builtin


def names() -> list[str]:
    """What a rule can give as its method, apart from ``module:Name``."""
    return _METHODS.names()


def known() -> list[type[Treatment]]:
    """The package's methods, installed ones, and those by ``module:Name`` that a rule of this process has named."""
    return [*(found for name in names() if (found := find(name)) is not None), *_elsewhere.values()]


@functools.cache
def find(method: str) -> type[Treatment] | None:
    """The treatment of a method; None where there is no such name.

    Raises:
      UserError: what was named cannot be imported, or is no treatment.
    """
    found = _METHODS.find(method)
    if found is None or method in own():
        return found
    if found.Section.model_fields["method"].default != method:
        # Found by where it stands, a rule goes on to call it so: that is what finds it again.
        section = _called(found.Section, method)
        found = type(found.__name__, (found,), {"Section": section, "store": method, "__doc__": found.__doc__})
    if ":" in method:
        _elsewhere[method] = found
    return found


def _called(section: type[RuleConfig], method: str) -> type[RuleConfig]:
    """A section whose method has another name."""
    described = section.model_fields["method"].description
    fields: dict[str, Any] = {"method": (Literal[method], Field(default=method, description=described))}
    return create_model(section.__name__, __base__=section, **fields)
