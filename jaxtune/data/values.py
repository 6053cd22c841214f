"""Values of rows: whatever a source stores, as the values of JSON; and JSON as text.

A row holds what JSON can hold, from every source alike: text, numbers, switches, nulls, lists and objects with text as
keys. Dates and times are ISO 8601, a decimal is the text of its digits, a duration a number of seconds, a NaN is null.
What has no such value (bytes that are no UTF-8, an infinite number) stays in the row as it is, since nobody may ask for
it, and is refused where it is written (:func:`as_text`).
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
"""How many nanoseconds a unit of time has, by its name in NumPy and Arrow."""


def plain(value: Any) -> Any:
    """A value as JSON has it, at any depth; what JSON has not stays as it is.

    A number of less than 64 bits becomes the one of the same shortest digits (a float32 0.1 is 0.1).
    """
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return {key_text(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(bytes(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        # Whole numbers, of images and the like, need no look at each.
        return value.tolist() if value.dtype.kind in "iub" or not value.ndim else [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain_scalar(value)
    return _plain_object(value)


def _plain_scalar(value: np.generic) -> Any:
    if isinstance(value, np.datetime64):
        return iso_text(value)
    if isinstance(value, np.timedelta64):
        return None if np.isnat(value) else seconds(int(value / np.timedelta64(1, "ns")))
    item = value.item()
    # NumPy writes the digits that tell a number from its neighbours of the same width.
    return plain(float(str(value)) if isinstance(item, float) else item)


def _plain_object(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return format(value, "f") if value.is_finite() else plain(float(value))
    if isinstance(value, (datetime.date, datetime.time)):
        # pandas' missing time is a date that differs from itself.
        return value.isoformat() if value == value else None
    if isinstance(value, datetime.timedelta):
        # pandas counts nanoseconds beyond what the class holds.
        return seconds(value // datetime.timedelta(microseconds=1) * 1000 + getattr(value, "nanoseconds", 0))
    return str(value) if isinstance(value, uuid.UUID) else value


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def seconds(nanoseconds: int) -> int | float:
    """A duration in seconds, a whole number where it is one."""
    whole, part = divmod(nanoseconds, 10**9)
    return nanoseconds / 10**9 if part else whole


def iso_text(value: np.datetime64) -> str | None:
    """A time as ISO 8601, with the digits of a second that Python writes (none or six) or nine where it needs them."""
    if np.isnat(value):
        return None
    whole, _, fraction = str(value).partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}.{fraction.ljust(6 if len(fraction) <= 6 else 9, '0')}" if fraction else whole


def key_text(key: Any) -> str:
    """A key of an object, which is text in JSON."""
    return key if isinstance(key, str) else as_text(key) or "null"


def as_text(value: Any) -> str | None:
    """A value as a template writes it: text as it is, anything else as JSON; None for null.

    Raises:
      ValueError: it has no text; the message says what it is.
    """
    try:
        value = plain(value)
        if value is None or isinstance(value, str):
            return value
        refused = _refused(value)
        if refused is not None:
            raise ValueError(refused)
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("a value that is nested too deeply") from error


def _refused(value: Any) -> str | None:
    """What JSON does not have in a plain value; None where it has all of it."""
    if value is None or isinstance(value, (str, int)):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else "an infinite number"
    if isinstance(value, bytes):
        return "bytes that are no UTF-8"
    if isinstance(value, (dict, list)):
        entries = value.values() if isinstance(value, dict) else value
        return next((found for found in map(_refused, entries) if found), None)
    return f"a value of type {type(value).__name__}"


def read_json(text: str) -> Any:
    """Reads JSON, strictly: a key stands once in an object, and Infinity is no number. NaN, which others write for what
    is missing, is null.

    Raises:
      json.JSONDecodeError: the text is malformed.
      ValueError: a key stands twice, a number is none or has thousands of digits.
      RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(text)


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs.

    Raises:
      ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_constant)
