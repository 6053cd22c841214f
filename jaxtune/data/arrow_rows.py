"""Rows of Arrow tables (Parquet, saved data sets), whatever the types of their columns.

Arrow's own way to Python fails on values that Python's types cannot hold (a date of the year 20000, a nanosecond where
pandas is missing, text that is no UTF-8), though nobody may ask for the column. So times are read as the numbers that
they are stored as, and become text here. Only whoever has a table needs pyarrow: functions import it.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.values import NANOSECONDS, iso_text, key_text, plain, seconds, unique_keys
from jaxtune.errors import UserError

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class _Reading(NamedTuple):
    """How values of a type are read: the type that they are cast to, and what makes plain values of Arrow's (none: they
    are plain)."""

    stored: Any
    read: Callable[[Any], Any] | None = None


def arrow_rows(table: Any, where: Callable[[int], str]) -> list[dict[str, Any]]:
    """The rows of a table, with plain values (:func:`~jaxtune.data.values.plain`); a map is an object.

    Args:
      table: a ``pyarrow.Table``.
      where: says where a row stands; called for messages only.

    Raises:
      UserError: a map has a key twice, or a struct two fields of one name.
    """
    columns = [_column(name, table.column(place), where) for place, name in enumerate(table.column_names)]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _column(name: str, column: Any, where: Callable[[int], str]) -> list[Any]:
    try:
        reading = _reading(column.type)
        try:
            values = _stored(column, reading)
        except UnicodeDecodeError:
            reading = _reading(column.type, text_as_bytes=True)
            values = _stored(column, reading)
    except ValueError as error:
        raise UserError(f"{where(0)}: column {name!r}: {error}") from error
    if reading.read is None:
        return values
    found = []
    for index, value in enumerate(values):
        try:
            found.append(reading.read(value))
        except ValueError as error:
            raise UserError(f"{where(index)}: column {name!r}: {error}") from error
    return found


def _stored(column: Any, reading: _Reading) -> list[Any]:
    return (column if column.type == reading.stored else column.cast(reading.stored)).to_pylist()


@functools.lru_cache(maxsize=256)
def _reading(kind: Any, *, text_as_bytes: bool = False) -> _Reading:
    """How values of a type are read.

    Raises:
      ValueError: a struct has two fields of one name.
    """
    import pyarrow
    from pyarrow import types

    inner = functools.partial(_reading, text_as_bytes=text_as_bytes)
    if types.is_struct(kind):
        return _struct(kind, inner)
    if types.is_map(kind):
        return _map(kind, inner)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _list(kind, inner)
    if types.is_dictionary(kind):
        return inner(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind):
        return _Reading(pyarrow.large_binary(), _nullable(plain)) if text_as_bytes else _Reading(kind)
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_null(kind):
        return _Reading(kind)
    if types.is_float16(kind) or types.is_float32(kind):
        width: Any = np.float16 if types.is_float16(kind) else np.float32
        return _Reading(kind, _nullable(lambda value: plain(width(value))))
    return _time(kind) or _Reading(kind, _nullable(plain))


def _nullable(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _struct(kind: Any, inner: Callable[[Any], _Reading]) -> _Reading:
    import pyarrow

    fields = [kind.field(place) for place in range(kind.num_fields)]
    unique_keys([(field.name, None) for field in fields])
    readings = [inner(field.type) for field in fields]
    pairs = zip(fields, readings, strict=True)
    stored = pyarrow.struct([field.with_type(reading.stored) for field, reading in pairs])
    reads = {field.name: reading.read for field, reading in zip(fields, readings, strict=True) if reading.read}
    if not reads:
        return _Reading(stored)
    return _Reading(
        stored,
        _nullable(
            lambda value: {name: reads[name](entry) if name in reads else entry for name, entry in value.items()}
        ),
    )


def _map(kind: Any, inner: Callable[[Any], _Reading]) -> _Reading:
    import pyarrow

    keys, items = inner(kind.key_type), inner(kind.item_type)
    read_key, read_item = keys.read or plain, items.read or (lambda value: value)

    def read(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        return unique_keys([(key_text(read_key(name)), read_item(entry)) for name, entry in pairs])

    return _Reading(pyarrow.map_(keys.stored, kind.item_field.with_type(items.stored)), _nullable(read))


def _list(kind: Any, inner: Callable[[Any], _Reading]) -> _Reading:
    import pyarrow
    from pyarrow import types

    item = inner(kind.value_type)
    field = kind.value_field.with_type(item.stored)
    if types.is_fixed_size_list(kind):
        stored = pyarrow.list_(field, kind.list_size)
    else:
        stored = pyarrow.large_list(field) if types.is_large_list(kind) else pyarrow.list_(field)
    read = item.read
    return _Reading(stored, None if read is None else _nullable(lambda values: [read(value) for value in values]))


def _time(kind: Any) -> _Reading | None:
    """How times and durations are read; None for anything else."""
    import pyarrow
    from pyarrow import types

    if types.is_date(kind):
        unit, stored = ("D", pyarrow.int32()) if types.is_date32(kind) else ("ms", pyarrow.int64())
        return _Reading(stored, _nullable(lambda count: _iso(count, unit).partition("T")[0]))
    if types.is_time(kind):
        stored = pyarrow.int32() if types.is_time32(kind) else pyarrow.int64()
        return _Reading(stored, _nullable(lambda count: _iso(count, kind.unit).partition("T")[2]))
    if types.is_duration(kind):
        return _Reading(pyarrow.int64(), _nullable(lambda count: seconds(count * NANOSECONDS[kind.unit])))
    if types.is_timestamp(kind):
        zone = None if kind.tz is None else _zone(kind.tz)
        return _Reading(pyarrow.int64(), _nullable(lambda count: _timestamp(count, kind.unit, zone)))
    return None


def _iso(count: int, unit: Any) -> str:
    return iso_text(np.datetime64(count, unit)) or ""


def _timestamp(count: int, unit: str, zone: datetime.tzinfo | None) -> str:
    """An Arrow timestamp, which counts from 1970 in UTC, as ISO 8601 with its zone's offset."""
    text = _iso(count, unit)
    if zone is None:
        return text
    try:
        shown = (_EPOCH + datetime.timedelta(seconds=count * NANOSECONDS[unit] // 10**9)).astimezone(zone).isoformat()
    except OverflowError:
        return f"{text}+00:00"
    return shown[:19] + text[19:] + shown[19:]


def _zone(name: str) -> datetime.tzinfo:
    """The time zone of this name; where this machine does not know it, the same moments are told in UTC."""
    import pyarrow
    from pyarrow.lib import string_to_tzinfo

    try:
        return string_to_tzinfo(name)
    except (pyarrow.ArrowException, ValueError, KeyError):
        return datetime.UTC
