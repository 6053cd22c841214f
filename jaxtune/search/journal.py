"""The journal of a study, ``trials.jsonl``: append-only, one JSON object a line, the truth that a restart reads.

A record is on the disk before the study goes on. The process that writes holds a lock for as long as it lives. JSON has
no NaN: a number that is not finite is written as null.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import UserError
from jaxtune.files import acquire_lock, lock_holder
from jaxtune.layout import RunFiles

logger = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NumPy scalars become Python numbers, tuples lists, and NaN and infinities None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a journal's bytes and the length of the whole ones: less than all where the last line is torn.

    Raises:
      UserError: a line before the last one is no JSON object.
    """
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    records, length = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "event" not in record:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not a journal record ({line[:60].decode(errors='replace')!r}); restore the "
                f"line, or cut the file before it to run the later trials again"
            )
        records.append(record)
        length = min(length + len(line) + 1, len(data))
    return records, length


def read_journal(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The whole records of a study's journal, for readers: takes no lock and changes nothing.

    Raises:
      UserError: there is no journal, or a line before the last one is no record.
    """
    path = RunFiles(run_dir).journal_path
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such journal; {run_dir} is not the run directory of a study") from error
    return _parse(data, path)[0]


def check_free(run_dir: str | os.PathLike[str]) -> None:
    """Refuses a study that another process runs, before a model is opened for nothing.

    Raises:
      UserError: one does; the message names it.
    """
    directory = RunFiles(run_dir)
    holder = lock_holder(directory.study_lock_path)
    if holder is not None:
        raise UserError(f"{directory.path}: this study is being run by {holder.text}; {_advice(directory)}")


def _advice(directory: RunFiles) -> str:
    return f"wait, or stop it with: jaxtune study stop {directory.path}"


class Journal:
    """The journal of one study, locked for this process while open.

    A torn last line, left by a crash in the middle of a write, is cut off with a warning.

    Args:
      run_dir: the study's run directory; created if missing.

    Attributes:
      records: all records, oldest first.

    Raises:
      UserError: another process holds the study, or a line before the last one is no record.
    """

    def __init__(self, run_dir: str | os.PathLike[str]):
        directory = RunFiles(run_dir)
        directory.path.mkdir(parents=True, exist_ok=True)
        self.path = directory.journal_path
        self._lock = acquire_lock(directory.study_lock_path, "study", _advice(directory))
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self.records: list[dict[str, Any]] = self._recover()
        except BaseException:
            os.close(self._lock)
            raise
        _sync_directory(directory.path)

    def _recover(self) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        records, length = _parse(data, self.path)
        if length < len(data):
            torn = data[length:]
            logger.warning(
                "%s: the last line is incomplete (%r); going on from the %d whole records before it",
                self.path,
                torn[:60].decode(errors="replace"),
                len(records),
            )
            os.ftruncate(self._file, length)
            os.fsync(self._file)
        self._end = length
        os.lseek(self._file, length, os.SEEK_SET)
        if records and not data[:length].endswith(b"\n"):
            self._write(b"\n")
        return records

    def _write(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            # A full disk must not leave half a record before the next one.
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._end += len(data)

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Writes one record and waits until it is on the disk; returns it as it was written.

        Raises:
          OSError: the disk is full or gone; the journal then ends with the record before.
        """
        record = plain({"event": event, **fields, "time": time.time()})
        self._write(json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self.records.append(record)
        return record

    def close(self) -> None:
        """Closes the file and gives up the lock."""
        os.close(self._file)
        os.close(self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sync_directory(directory: Path) -> None:
    """Makes a new file's name durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def difference(recorded: Any, wanted: Any, key: str = "") -> str | None:
    """The first difference between two nested values as ``"key: recorded, not wanted"``; None where they are equal."""
    recorded, wanted = plain(recorded), plain(wanted)
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        for name in [*recorded, *(name for name in wanted if name not in recorded)]:
            inner = f"{key}.{name}" if key else name
            if name not in wanted:
                return f"{inner} is {_short(recorded[name])} there and absent here"
            if name not in recorded:
                return f"{inner} is absent there and {_short(wanted[name])} here"
            found = difference(recorded[name], wanted[name], inner)
            if found is not None:
                return found
        return None
    if isinstance(recorded, list) and isinstance(wanted, list) and len(recorded) == len(wanted):
        pairs = (difference(a, b, f"{key}.{i}") for i, (a, b) in enumerate(zip(recorded, wanted, strict=True)))
        return next((found for found in pairs if found is not None), None)
    return None if recorded == wanted else f"{key} is {_short(recorded)} there and {_short(wanted)} here"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
