"""The directories of studies: whether one is there, which are around, and the commands that use them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import parse_value
from jaxtune.errors import UserError, nearest
from jaxtune.layout import JOURNAL_FILE, RunFiles


def study_directory(run_dir: str | os.PathLike[str]) -> Path:
    """The directory, if there is a study in it.

    Raises:
      UserError: there is none; names the nearest directory that has one.
    """
    directory = Path(run_dir)
    if RunFiles(directory).journal_path.is_file():
        return directory
    if directory.is_file():
        raise UserError(f"{directory}: a file; give the run directory of a study{_inside(directory)}")
    if RunFiles(directory).metrics_path.is_file():
        raise UserError(f"{directory}: this is a single run, not a study (it has no {JOURNAL_FILE})")
    problem = f"no study here (it has no {JOURNAL_FILE})" if directory.is_dir() else "no such directory"
    raise UserError(f"{directory}: {problem}{nearest(str(directory), map(str, studies_around(directory)))}")


def _inside(file: Path) -> str:
    return f", such as {file.parent}" if RunFiles(file.parent).journal_path.is_file() else ""


def studies_around(directory: Path) -> Iterator[Path]:
    """Directories with a study: below the directory itself, and beside it."""
    for parent in (directory, directory.parent):
        if parent.is_dir():
            for found in sorted(parent.glob(f"*/{JOURNAL_FILE}")):
                yield found.parent


def find_studies(directory: str | os.PathLike[str]) -> list[Path]:
    """The directories of all studies below a directory, itself included, by name.

    Raises:
      UserError: there is no such directory.
    """
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such directory")
    found = []
    for place, folders, files in os.walk(directory):
        if JOURNAL_FILE in files:
            found.append(Path(place))
            folders.clear()  # a study's own folders hold trials
    return sorted(found)


def train_command(run_dir: str | os.PathLike[str], configuration: Mapping[str, Any], target: str) -> str:
    """The command line that trains one configuration of a study by itself.

    Args:
      run_dir: the study's.
      configuration: dotted overrides.
      target: the run directory of the training.
    """
    overrides = [f"{key}={_argument(value)}" for key, value in configuration.items()]
    return shlex.join(["jaxtune", "train", str(RunFiles(run_dir).config_path), *overrides, f"run_dir={target}"])


def export_command(run_dir: str | os.PathLike[str], *, merged: bool = True) -> str:
    """The command line that writes a study's winner, or a run's model, as one that transformers loads.

    Args:
      run_dir: of the study or the run.
      merged: as a model; else as an adapter of PEFT's, where no model can hold what was trained.
    """
    kind = "merged" if merged else "peft"
    return shlex.join(["jaxtune", "export", str(run_dir), f"--{kind}", f"{run_dir}-{kind}"])


def _argument(value: Any) -> str:
    """A value as an override that is read as the same value."""
    if isinstance(value, str) and parse_value(value) == value:
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
