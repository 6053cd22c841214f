"""What ``export``, ``evaluate`` and ``generate`` work on: a run, a trial of a study, an adapter, the untuned model."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.cli.common import add_json_argument, path_argument, start
from jaxtune.errors import UserError, nearest
from jaxtune.layout import CONFIG_FILE, RunFiles, TrialDirectory

if TYPE_CHECKING:
    from jaxtune.config import Config
    from jaxtune.search.trial import TrialState
    from jaxtune.training.opened_config import OpenedConfig
    from jaxtune.training.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """``RUN [key=value ...] [--json] [--dry-run] [--trial N | --adapter DIR | --untuned]``; returns the last group."""
    parser.add_argument(
        "config",
        metavar="RUN",
        type=path_argument,
        help="the directory of a run or of a study, of which the winner is taken; or a YAML file",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys of the configuration")
    add_json_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything that comes before; write nothing")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--trial", metavar="N", type=int, help="a finished trial of the study, by its number, instead of the winner"
    )
    group.add_argument(
        "--adapter", metavar="DIR", type=path_argument, help="a PEFT adapter, instead of what the run or study trained"
    )
    group.add_argument("--untuned", action="store_true", help="the model as it is")
    return group


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a command works on, before the model is opened.

    Attributes:
      config: of the run, or of the study.
      trial: of the study; None for a run, an adapter or the untuned model.
      origin: what the trial is, for people.
      adapter: a PEFT directory.
      untuned: the model as it is.
      winner: the trial is the study's winner, the study having been given as a whole.
    """

    config: Config
    trial: TrialState | None = None
    origin: str = ""
    adapter: str | None = None
    untuned: bool = False
    winner: bool = False

    def open(self, opened: OpenedConfig) -> Trained:
        """The trained state, over the opened configuration."""
        from jaxtune.search.trained import trained_trial
        from jaxtune.training.trained import trained

        if self.trial is not None:
            return trained_trial(opened, self.trial, origin=self.origin)
        return trained(opened, adapter=self.adapter, untuned=self.untuned)


def start_subject(
    arguments: argparse.Namespace, begin: Callable[[argparse.Namespace], Config] = start, naming: str = "--trial "
) -> Subject:
    """Starts the command and finds what it works on; opens no model.

    Args:
      arguments: as :func:`add_arguments` declares them.
      begin: reads the configuration.
      naming: what stands before a trial's number where messages tell how to name one.

    Raises:
      UserError: there is no run or study, it has no winner yet, or the trial is none that was finished.
    """
    folder = _folder(arguments.config)
    number, inside = arguments.trial, None if folder is None else _trial_in(folder)
    if inside is not None:
        if number is not None:
            raise UserError(f"--trial {number}: {folder} is a trial itself; give the study's directory, {inside[0]}")
        folder = inside[0]
    if folder is not None:
        arguments.config = str(RunFiles(folder).config_path)
    config = begin(arguments)

    from jaxtune.search.trained import any_trial, finished_trial, winner

    if arguments.adapter or arguments.untuned:
        return Subject(config, adapter=arguments.adapter, untuned=arguments.untuned)
    name = config.directory
    if inside is not None:
        return Subject(config, any_trial(name, inside[1]), f"trial {inside[1]} of {name}")
    if number is not None:
        return Subject(config, finished_trial(name, number, naming), f"trial {number} of {name}")
    if RunFiles(name).journal_path.is_file():
        best = winner(name, naming)
        return Subject(config, best, f"the winner of {name}, trial {best.trial.id},", winner=True)
    return Subject(config)


def next_steps(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Lines that say where the adapter or the model is and which commands come next, once a run or a study has ended.

    Args:
      config: of the run or the study.
      summary: as it was written.
    """
    from jaxtune.search.directory import export_command
    from jaxtune.updates import treatments

    used = [treatments.find(rule.method) for rule in config.update]
    merged = not any(method is not None and method.only_alone() for method in used)
    name = shlex.quote(config.directory)
    split = next((part for part in ("test", "validation") if getattr(config.data, part) is not None), None)
    asked = "--prompt 'your text'" if config.data.messages is None else "--messages talks.jsonl"
    commands = [
        *([f"jaxtune evaluate {name} --split {split}"] if split else []),
        f"jaxtune generate {name} {asked}",
        export_command(config.directory, merged=merged),
    ]
    loaders = {"adapter": "PEFT", "model": "transformers"}
    place = [f"{name}, as {by} loads it: {summary[name]['path']}" for name, by in loaders.items() if name in summary]
    return [*place, "what comes next:", *(f"  {command}" for command in commands)]


def _folder(given: str) -> Path | None:
    """The directory of a run, a study or a trial that was given, or whose ``config.yaml`` was; None for another file.

    Raises:
      UserError: it is a directory without either, or is not there; names the nearest one that has.
    """
    path = Path(given)
    if path.is_dir():
        if RunFiles(path).config_path.is_file():
            return path
        raise UserError(f"{path}: no run or study here (it has no {CONFIG_FILE}){_nearest(path)}")
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: no such directory{_nearest(path)}")
    return path.parent if path.name == CONFIG_FILE and _trial_in(path.parent) else None


def _nearest(path: Path) -> str:
    around = [
        found.parent for place in (path, path.parent) if place.is_dir() for found in place.glob(f"*/{CONFIG_FILE}")
    ]
    return nearest(str(path), sorted(map(str, around)))


def _trial_in(folder: Path) -> tuple[Path, int] | None:
    """The study and the number of the trial whose directory this is; None where it is none."""
    trial = TrialDirectory(folder)
    return None if trial.study_path is None or trial.number is None else (trial.study_path, trial.number)
