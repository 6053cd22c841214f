"""Whether what a summary's class says of its keys is true of a summary."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, NotRequired

from beartype.door import is_bearable


def check_types(told: type, values: Mapping[str, Any]) -> None:
    """Asserts that every key that is told is there, unless it need not be, and is of its type; a summary has no others.

    Args:
      told: a class with annotations: a summary's, or a TypedDict.
      values: what it tells of.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(told, include_extras=True).items() if name[0] != "_"}
    assert hints
    if not typing.is_typeddict(told):
        assert not [name for name in values if name not in hints and not hasattr(told, name)]
    for name, hint in hints.items():
        if typing.get_origin(hint) is NotRequired:
            if name not in values:
                continue
            (hint,) = typing.get_args(hint)
        assert name in values, f"{told.__name__} has no {name}"
        assert is_bearable(values[name], hint), f"{told.__name__}.{name} is no {hint}: {values[name]!r}"
        for part in (hint, *typing.get_args(hint)):
            if typing.is_typeddict(part) and values[name] is not None:
                for value in values[name] if isinstance(values[name], list) else [values[name]]:
                    check_types(part, value)
