"""What a user is told when the input is wrong.

Everything that a user can cause (a misspelt key, a missing file, a malformed line) raises :class:`UserError`. The
command line prints its message alone and exits with code 2; library callers can catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class UserError(ValueError):
    """The user's input is wrong; the message names the file, the key or the line, and the nearest valid choice."""


def kind_of(value: object) -> str:
    """What a value is, for a message that says what it should be: ``a str``, ``a tuple of 3``, ``nothing``."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping) and not value:
        return "an empty one"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"


def nearest(name: object, choices: Iterable[object], limit: int = 3, *, listed: bool = True) -> str:
    """A phrase that points from a wrong ``name`` to the valid ``choices``, ready to follow a message.

    Args:
      name: what was given.
      choices: what would be valid.
      limit: how many close ones are named at most.
      listed: whether to list the choices where none is close. A folder's files are no list to choose from.

    Returns ``"; did you mean 'x'?"`` where something is close, ``"; choose from a, b, c"`` where nothing is, and ``""``
    where there is nothing to choose.
    """
    valid = [str(choice) for choice in choices]
    if not valid:
        return ""
    close = difflib.get_close_matches(str(name), valid, n=limit, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(repr(choice) for choice in close)}?"
    if not listed:
        return ""
    shown = ", ".join(valid[:12]) + (", …" if len(valid) > 12 else "")
    return f"; choose from {shown}"
