"""``jaxtune report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtune.cli.common import add_json_argument, emit

EXAMPLE = "jaxtune report runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "run", metavar="RUN_DIR|CONFIG", help="a study's directory, or the YAML file it was started with"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, when a YAML file is given")
    add_json_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="check that there is a study; write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Writes ``report.html`` from a study's files alone."""
    from jaxtune.config import load_config
    from jaxtune.errors import UserError
    from jaxtune.reports import read_study, write_report

    given = Path(arguments.run)
    if arguments.overrides and given.is_dir():
        raise UserError(f"{arguments.overrides[0]}: overrides go with a YAML file, not with a directory")
    directory = given if given.is_dir() else Path(load_config(given, arguments.overrides).directory)
    if arguments.dry_run:
        read_study(directory)
        emit({"checked": True, "run_dir": str(directory)}, arguments.json, f"{directory} holds a study")
        return 0
    path = write_report(directory)
    emit({"report": str(path)}, arguments.json, f"report in {path}")
    return 0
