"""``jaxtune compare``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.cli.common import add_json_argument, emit, path_argument, say, start_devices, table
from jaxtune.cli.trained import Subject, start_subject
from jaxtune.errors import UserError, nearest
from jaxtune.layout import TrialDirectory

if TYPE_CHECKING:
    from jaxtune.config import Config
    from jaxtune.reports.comparison import Side
    from jaxtune.training.opened_config import Part

EXAMPLE = "jaxtune compare runs/mine runs/quickstart runs/quickstart@3 --html compared.html"

_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")
_UNTUNED = "untuned"
# Lines of a table on a terminal, and of the page's list of examples.
_SHOWN, _LISTED = 8, 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=path_argument,
        help="the directory of a run, or of a study, whose winner is taken; STUDY@3 is its trial 3, RUN@untuned the "
        "model before training; and key=value, dotted keys that are changed for all",
    )
    add_json_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="check that all can be compared; evaluate nothing")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument("--html", metavar="PAGE", type=path_argument, help="write a page as well")


def run(arguments: argparse.Namespace) -> int:
    """Compares two runs or more on the same examples; evaluates those that no earlier call has."""
    overrides = [word for word in arguments.runs if _OVERRIDE.match(word) and not Path(word).exists()]
    names = [word for word in arguments.runs if word not in overrides]
    if len(names) < 2:
        raise UserError(f"{len(names)} RUN is nothing to compare; name two or more, such as: {EXAMPLE}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice}: named twice; name each run once")
    start_devices()
    subjects = {name: _subject(name, overrides) for name in names}
    split = arguments.split

    from jaxtune.files import check_writable, write_atomically
    from jaxtune.reports.comparison import comparison
    from jaxtune.reports.comparison_page import render_comparison

    if arguments.html:
        check_writable(arguments.html, "--html")
        if Path(arguments.html).is_dir():
            raise UserError(f"--html: {arguments.html} is a directory, not a file")
    _check(subjects, split)
    if arguments.dry_run:
        emit({"checked": True, "runs": names}, arguments.json, f"would compare {', '.join(names)} on data.{split}")
        return 0
    sides = _evaluated(subjects, split)
    result = comparison(sides, split)
    if arguments.html:
        page = render_comparison(result, sides, limit=_LISTED)
        write_atomically(Path(arguments.html), page)
        result["html"] = str(arguments.html)
        say(f"page in {arguments.html}")
    emit(result, arguments.json, _text(result))
    return 0


def _subject(name: str, overrides: Sequence[str]) -> Subject:
    """What a word names.

    Raises:
      UserError: there is no such run, study or trial.
    """
    from jaxtune.config import load_config

    path, at, which = name.rpartition("@")
    number, untuned = None, False
    if not at or Path(name).exists():
        path = name
    elif which.isdecimal():
        number = int(which)
    elif which == _UNTUNED:
        untuned = True
    else:
        raise UserError(f"{name}: behind @ stands a trial's number, or untuned{nearest(which, [_UNTUNED])}")
    given = argparse.Namespace(config=path, overrides=list(overrides), trial=number, adapter=None, untuned=untuned)

    def read(arguments: argparse.Namespace) -> Config:
        return load_config(arguments.config, arguments.overrides)

    return start_subject(given, read, f"{path}@")


def _config(subject: Subject) -> Config:
    """The configuration of a run, or of a trial."""
    from jaxtune.config import with_overrides

    return (
        subject.config if subject.trial is None else with_overrides(subject.config, subject.trial.trial.configuration)
    )


def _check(subjects: Mapping[str, Subject], split: Part) -> None:
    """Refuses what does not compare before any model is opened."""
    from jaxtune.reports.comparison import Asked, check_alike
    from jaxtune.training.opened_config import read_examples
    from jaxtune.training.predictions import row_identities

    asked: list[Asked] = []
    rows: dict[str, list[str]] = {}
    for name, subject in subjects.items():
        config = subject.config
        if getattr(config.data, split) is None:
            raise UserError(f"data.{split}: {name} has no such split; name another with --split")
        key = config.directory
        if key not in rows:
            rows[key] = row_identities(read_examples(config, (split,))[split])
        asked.append(Asked(name, _config(subject), rows[key]))
    check_alike(asked, split)


def _evaluated(subjects: Mapping[str, Subject], split: Part) -> list[Side]:
    """The predictions of all; a study is opened once for those of its trials that follow each other."""
    from jaxtune.reports.comparison import Side
    from jaxtune.training.opened_config import OpenedConfig
    from jaxtune.training.predictions import predictions

    sides: list[Side] = []
    opened: tuple[str, OpenedConfig] | None = None
    for name, subject in subjects.items():
        directory = subject.config.directory
        if opened is None or opened[0] != directory:
            opened = directory, OpenedConfig(subject.config, parts=(split,))
        trained = subject.open(opened[1])
        state = subject.trial
        folder = TrialDirectory(directory) if state is None else state.trial.files
        found = predictions(opened[1], trained, split, folder, name=f"{split}-{_UNTUNED}" if subject.untuned else None)
        origin = f"{trained.origin} of {directory}" if subject.untuned else trained.origin
        sides.append(Side(name, origin, _config(subject), Path(directory) if subject.winner else None, found))
    return sides


def _text(result: Mapping[str, Any]) -> str:
    """The comparison for people."""
    from jaxtune.reports import formatting
    from jaxtune.reports.comparison_page import interval

    runs, first = result["runs"], result["runs"][0]
    gains = {entry["run"]: entry["metrics"] for entry in result["differences"]}
    scores = [
        {
            "metric": metric,
            "run": run["run"],
            "score": formatting.score(run["metrics"].get(metric), metric),
            "± se": formatting.score(run["standard_errors"].get(metric), metric),
            f"difference to {first['run']}": interval(gains.get(run["run"], {}).get(metric), metric),
        }
        for metric in first["metrics"]
        for run in runs
    ]
    what = f"{result['examples']:,} examples of {result['documents']:,} documents of data.{result['split']}"
    keys = [
        {"key": key, **dict(zip((run["run"] for run in runs), map(formatting.setting, values), strict=True))}
        for key, values in result["keys"].items()
    ]
    texts = [table(scores, title=what), table(keys, title="settings that differ") or "all settings are the same"]
    asked = [row for row in result["side_by_side"] if row.get("differs")]
    if "answers" in (result["side_by_side"] or [{}])[0]:
        lines = [
            {
                "example": row["example"],
                "asked for": row["attribute"],
                "right": row["reference"],
                **{
                    run["run"]: f"{'✓' if right else '✗'} {answer}"
                    for run, answer, right in zip(runs, row["answers"], row["correct"], strict=True)
                },
            }
            for row in asked[:_SHOWN]
        ]
        told = f"answers to {len(asked):,} of {result['examples']:,} questions differ"
        texts.append(table(lines, title=told) or told)
    return "\n\n".join(texts)
