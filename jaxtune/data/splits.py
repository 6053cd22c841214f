"""Parts of a source: by name, by slice and by a seeded hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from fractions import Fraction
from typing import Any

from jaxtune.errors import UserError

_BOUND = r"-?\d+(?:\.\d+)?%?"
_SPLIT = re.compile(rf"(?P<name>[^\[\]:%]*)(?:\[(?P<start>{_BOUND})?:(?P<stop>{_BOUND})?\])?")


@dataclasses.dataclass(frozen=True)
class SplitSlice:
    """A split's name and the part of it that is wanted; a bound is a row number or a share such as ``10%``, to the
    nearest row; of two that are as near, the even one, as in ``tensorflow_datasets`` and ``datasets``."""

    name: str | None
    start: str | None = None
    stop: str | None = None

    def rows(self, count: int) -> range:
        """The wanted rows of a split of ``count`` rows; bounds beyond its ends are its ends, as in Python."""
        start, stop, _ = slice(_row(self.start, count), _row(self.stop, count)).indices(count)
        return range(start, max(start, stop))


def _row(bound: str | None, count: int) -> int | None:
    if bound is None or not bound.endswith("%"):
        return None if bound is None else int(bound)
    return round(Fraction(bound[:-1]) * count / 100)


def parse_split(split: str | None, *, key: str) -> SplitSlice:
    """Reads ``train``, ``train[:200]``, ``train[10%:20%]`` or ``[:200]``.

    Args:
      split: the text; ``None`` is the whole of the only split.
      key: configuration key that error messages name.

    Raises:
      UserError: the text is none of these.
    """
    if split is None:
        return SplitSlice(None)
    match = _SPLIT.fullmatch(split.strip())
    bounds = (match["start"], match["stop"]) if match else ()
    if match is None or any(bound and "." in bound and not bound.endswith("%") for bound in bounds):
        raise UserError(f"{key}.split: {split!r} is no split; write train, train[:200], train[10%:20%] or [:200]")
    return SplitSlice(match["name"].strip() or None, match["start"], match["stop"])


def unit_hash(value: Any, seed: int) -> float:
    """A number in [0, 1) that depends on the value and the seed only: the same in every process and on every platform.

    SHA-256 of ``seed`` and the value (text as it is, anything else as JSON with sorted keys, bytes in it as their
    hexadecimal digits); the first 53 bits are the fraction, which is what a float holds exactly.
    """
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=_digits)
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _digits(value: Any) -> str:
    """What JSON has no value for."""
    return value.hex() if isinstance(value, bytes) else str(value)
