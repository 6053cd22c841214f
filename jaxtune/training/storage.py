"""What goes wrong in Orbax's storage (TensorStore), told as an error of the system, and once."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune.files import naming

_CODE = re.compile(r"os_error_code='(\d+)'")


@contextlib.contextmanager
def system_errors(directory: Path) -> Iterator[None]:
    """Within the block an error that quotes the system's number is an ``OSError``, which names a file or the directory.

    TensorStore reports a full disk, or one that can only be read by now, as a ``ValueError``.
    """
    try:
        with naming(directory):
            yield
    except ValueError as error:
        if (code := _CODE.search(str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error


def quiet_storage() -> None:
    """Leaves out what is told besides of an operation that has failed.

    Orbax starts many reads and writes at a time and raises the first error. It tells of the others, and so does
    asyncio, with their tracebacks; those that end after that find no event loop any more, of which Python tells.
    """
    # Of every save Orbax tells on the root logger's absl child as well; a run prints its own line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_no_storage_error)
    _leave_out_late_ends()


def _is_no_storage_error(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return "tensorstore" not in str(error)


@functools.cache
def _leave_out_late_ends() -> None:
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
        if not (late and unraisable.object is None) and not _is_of_storage(unraisable.object):
            before(unraisable)

    sys.unraisablehook = hook


def _is_of_storage(source: Any) -> bool:
    """Whether it is a read or a write of Orbax, which was given up when another one had failed."""
    return inspect.iscoroutine(source) and "orbax" in Path(source.cr_code.co_filename).parts
