"""``jaxtune study list``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxtune.cli.common import add_json_argument, emit, path_argument, say, table
from jaxtune.errors import UserError
from jaxtune.search.directory import find_studies
from jaxtune.search.status import read_status

EXAMPLE = "jaxtune study list runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "directory",
        metavar="DIRECTORY",
        type=path_argument,
        nargs="?",
        default="runs",
        help="where to look (default: runs)",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Lists the studies below a directory, one row each."""
    rows, damaged = [], {}
    for directory in find_studies(arguments.directory):
        try:
            rows.append(_row(directory))
        except UserError as error:
            damaged[str(directory)] = str(error)
    # One damaged journal must not hide the others.
    for message in damaged.values():
        say(f"jaxtune: {message}")
    none = f"no study below {arguments.directory}"
    emit({"studies": rows, "damaged": damaged}, arguments.json, table([_short(row) for row in rows]) or none)
    return 0


def _row(directory: Path) -> dict[str, Any]:
    status = read_status(directory)
    best = next((trial for trial in status.trials if trial.trial == status.best), None)
    return {
        "run_dir": str(directory),
        "phase": status.phase,
        "planned": status.planned,
        "scored": sum(trial.early_score is not None for trial in status.trials),
        "finished": status.count("finished"),
        "failed": status.count("failed"),
        "objective": status.objective,
        "objectives": list(status.objectives),
        "best_trial": status.best,
        "best_early_score": None if best is None else best.early_score,
        "best_final_score": None if best is None else best.final_score,
        "running": None if status.holder is None else status.holder.text,
    }


def _short(row: dict[str, Any]) -> dict[str, Any]:
    final = row["best_final_score"]
    return {
        "study": row["run_dir"],
        "phase": row["phase"],
        "trials": row["planned"],
        "scored": row["scored"],
        "finished": row["finished"],
        "failed": row["failed"],
        "best": f"trial {row['best_trial']}" if row["best_trial"] is not None else "",
        "score": row["best_early_score"] if final is None else final,
        "objective": ", ".join(row["objectives"]),
        "run by": row["running"] or "nobody",
    }
