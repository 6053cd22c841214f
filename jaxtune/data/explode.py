"""One row with a mapping (attribute -> value) becomes one example per entry."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config.data_section import ExplodeConfig
from jaxtune.data.sources import locate
from jaxtune.data.values import plain, read_json
from jaxtune.errors import UserError, nearest

logger = logging.getLogger(__name__)

# Keys to ask for: the same for every row, or by the value of the field schema_by.
Schema = list[str] | dict[str, list[str]]


def explode(rows: Sequence[Any], config: ExplodeConfig, *, key: str = "data.train") -> list[tuple[int, dict[str, Any]]]:
    """Turns each row into one row per entry of its mapping ``config.field``.

    The new rows hold the old fields and, under ``config.key`` and ``config.value``, the entry. What counts as an entry:

    - Without a schema: every key of the mapping, in its order. A ``null`` value is no entry (Parquet and Arrow fill up
      the keys of other rows with nulls). An empty string or list is an entry whose value is ``config.absent`` (TFDS
      stores fixed keys and has no nulls).
    - With a schema: exactly the schema's keys, in its order; a key that the row lacks, or that is null or empty there,
      has the value ``config.absent``. Keys of the row outside the schema are not asked for, since whoever uses the
      model could not know of them; their number is logged.

    A value that is a list stays one entry: one question has one answer. Texts are joined with ``", "``; any other list,
    and an object, is what templates write as JSON.

    Args:
      rows: the rows.
      config: the fields' names and the schema.
      key: configuration key of the source, for messages.

    Returns:
      Pairs of the old row's index and the new row.

    Raises:
      UserError: a row lacks a field, the mapping is none, a name is taken, or the schema does not fit.
    """
    schema = None if config.schema_path is None else read_schema(config)
    exploded = []
    outside = 0
    for index, row in enumerate(rows):
        mapping = {name: plain(value) for name, value in _mapping(row, config, rows, index, key).items()}
        if schema is None:
            entries = {name: value for name, value in mapping.items() if value is not None}
        else:
            names = _schema_keys(schema, row, config, rows, index)
            entries = {name: mapping.get(name) for name in names}
            outside += sum(name not in entries and not _is_absent(value) for name, value in mapping.items())
        for name, value in entries.items():
            exploded.append((index, {**row, config.key: name, config.value: _value(value, config.absent)}))
    if outside:
        logger.warning("%s: %d values have keys outside %s and are not asked for", key, outside, config.schema_path)
    if not exploded:
        raise UserError(f"{key}: data.explode.field {config.field!r} has no entry in any row")
    return exploded


def read_schema(config: ExplodeConfig) -> Schema:
    """Reads ``config.schema_path``: a JSON list of keys, or an object that gives a list of keys per category.

    Raises:
      UserError: the file is missing or holds something else, or ``schema_by`` does not go with it.
    """
    path = Path(config.schema_path or "").expanduser()
    try:
        schema = read_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UserError(
            f"data.explode.schema_path: {path} does not exist{nearest(path.name, names, listed=False)}"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"data.explode.schema_path: {path}, line {error.lineno}: malformed JSON: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.explode.schema_path: {path}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.explode.schema_path: {path}: malformed JSON: {error}") from error
    except OSError as error:
        raise UserError(f"data.explode.schema_path: {path} cannot be read: {error.strerror or error}") from error
    if _is_list_of_names(schema):
        if config.schema_by is not None:
            raise UserError(f"data.explode.schema_by: {path} holds one list of keys for all rows; leave schema_by out")
        return schema
    if not isinstance(schema, dict) or not schema or not all(_is_list_of_names(names) for names in schema.values()):
        raise UserError(
            f"data.explode.schema_path: {path} holds neither a list of keys nor a list of keys per category"
        )
    if config.schema_by is None:
        raise UserError(f"data.explode.schema_by: say which field picks the category of {path}")
    return schema


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _mapping(row: Mapping[str, Any], config: ExplodeConfig, rows: Sequence[Any], index: int, key: str) -> Mapping:
    if config.field not in row:
        raise UserError(
            f"{key}: {locate(rows, index)} has no field {config.field!r} (data.explode.field)"
            f"{nearest(config.field, row)}"
        )
    for option, name in (("key", config.key), ("value", config.value)):
        if name in row:
            raise UserError(
                f"data.explode.{option}: {locate(rows, index)} already has a field {name!r}; choose another name"
            )
    mapping = row[config.field]
    if not isinstance(mapping, Mapping):
        raise UserError(
            f"{key}: {locate(rows, index)}: field {config.field!r} (data.explode.field) holds "
            f"{type(mapping).__name__}, not a mapping"
        )
    return mapping


def _schema_keys(
    schema: Schema, row: Mapping[str, Any], config: ExplodeConfig, rows: Sequence[Any], index: int
) -> Sequence[str]:
    if isinstance(schema, list):
        return schema
    field = config.schema_by or ""
    if field not in row:
        raise UserError(f"data.explode.schema_by: {locate(rows, index)} has no field {field!r}{nearest(field, row)}")
    if not isinstance(row[field], str) or row[field] not in schema:
        raise UserError(
            f"data.explode.schema_by: {locate(rows, index)}: {config.schema_path} has no category {row[field]!r}"
            f"{nearest(row[field], schema)}"
        )
    return schema[row[field]]


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or value == []


def _value(value: Any, absent: str) -> Any:
    if isinstance(value, list):
        given = [item for item in value if not _is_absent(item)]
        if all(isinstance(item, str) for item in given):
            value = ", ".join(given)
    return absent if _is_absent(value) else value
