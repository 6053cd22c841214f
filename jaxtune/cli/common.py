"""What the commands share: arguments, start-up, output."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.errors import UserError
from jaxtune.files import user_path
from jaxtune.telemetry.tables import cell

if TYPE_CHECKING:
    from rich.table import Table

    from jaxtune.config import Config


def path_argument(text: str) -> str:
    """A path as the type of an argument: ``~`` is expanded.

    Raises:
      ArgumentTypeError: it names a user that there is not.
    """
    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_config_arguments(parser: argparse.ArgumentParser, *, dry_run: bool = True) -> None:
    """``CONFIG [key=value ...] [--json] [--dry-run]``."""
    parser.add_argument("config", metavar="CONFIG", type=path_argument, help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys of the configuration")
    add_json_argument(parser)
    if dry_run:
        parser.add_argument(
            "--dry-run", action="store_true", help="check files, data, shapes and memory; train and write nothing"
        )


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """``--accept-changed-data``."""
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="go on although the training or the validation split is not what it was at the beginning",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def start(arguments: argparse.Namespace) -> Config:
    """Quiets the libraries, joins the other processes, turns the compilation cache on, reads the configuration."""
    from jaxtune.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    start_devices()
    return config


def start_devices() -> None:
    """Quiets the libraries, joins the other processes, turns the compilation cache on."""
    # XLA's C++ side and absl report their start-up on standard error; a user cannot act on it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", category=UserWarning)
    # Before absl gives the root a handler that puts WARNING and the module's name in front of what is told.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)

    from jaxtune.parallel.distributed import start as join
    from jaxtune.parallel.platform import (
        cpu_alone,
        enable_compilation_cache,
        keep_freed_memory,
        leave_out_absent_accelerators,
    )

    leave_out_absent_accelerators()
    if cpu_alone():
        keep_freed_memory()
    join()
    enable_compilation_cache()


def say(text: str = "") -> None:
    """One line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def tell(name: str) -> None:
    """Shows on standard error what a module tells in passing, not its warnings alone."""
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
        logger.addHandler(_Said())
        logger.propagate = False


class _Said(logging.Handler):
    """Writes to what is standard error when something is told, not when this was made."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def emit(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """The result: one JSON object, in which a number that is not finite is null, or text for people."""
    from jaxtune.search.journal import plain

    print(json.dumps(plain(result), allow_nan=False) if as_json else text, flush=True)


def time_taken(seconds: float | int) -> str:
    """A time as the page of a study writes it, with spaces that every terminal knows."""
    from jaxtune.reports import formatting

    return formatting.seconds(seconds).replace(formatting.SPACE, " ")


def age(seconds: float | int) -> str:
    """How long ago something was."""
    from jaxtune.reports import formatting

    return formatting.age(seconds).replace(formatting.SPACE, " ")


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> str:
    """Rows as an aligned table that fits the terminal; numbers stand to the right and are never broken."""
    from rich.console import Console

    if not rows:
        return ""
    # What stands in a table is told as it is: brackets in a name are no markup, and colons no emoji.
    console = Console(width=None if sys.stdout.isatty() or sys.stderr.isatty() else 110, markup=False, emoji=False)
    whole = console.options.update(width=10_000)
    drawn = _table(rows, narrow=False)
    if console.measure(drawn, options=whole).maximum > console.width:
        drawn = _table(rows, narrow=True)
    if _least_width(rows) > console.width:
        return "\n".join(_record_lines(rows, title))
    with console.capture() as capture:
        if title is not None:
            # Not the table's own, which is broken where the table ends.
            console.print(title, style="italic", highlight=False, soft_wrap=True)
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


def _table(rows: Sequence[Mapping[str, Any]], *, narrow: bool) -> Table:
    """The table; a narrow one breaks the names of its columns of numbers after each underscore."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        numeric = _is_numeric(rows, name)
        header = str(name).replace("_", "_\n") if numeric and narrow else str(name)
        width = max(len(cell(row[name])) for row in rows) if numeric else None
        drawn.add_column(header, justify="right" if numeric else "left", overflow="fold", min_width=width)
    for row in rows:
        drawn.add_row(*(cell(value) for value in row.values()))
    return drawn


# A column of text may be broken into lines of this many characters, not into single letters.
_SHORTEST_TEXT = 12


def _is_numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(row[name], int | float | None) for row in rows)


def _least_width(rows: Sequence[Mapping[str, Any]]) -> int:
    """Characters that a table needs at least so that no number and no short word is broken."""
    widths = []
    for name in rows[0]:
        longest = max(len(cell(row[name])) for row in rows)
        parts = name.split("_") if _is_numeric(rows, name) else [name]
        head = max(len(part) for part in parts) + (len(parts) > 1)
        widths.append(max(longest, head) if _is_numeric(rows, name) else min(max(longest, len(name)), _SHORTEST_TEXT))
    return sum(widths) + 2 * (len(widths) - 1)


def _record_lines(rows: Sequence[Mapping[str, Any]], title: str | None) -> Iterator[str]:
    """Each row as lines of a name and a value, for a terminal that no table fits in."""
    if title:
        yield title
    width = max(map(len, rows[0]))
    for number, row in enumerate(rows):
        if number:
            yield ""
        yield from (f"{name:<{width}}  {cell(value)}" for name, value in row.items())
