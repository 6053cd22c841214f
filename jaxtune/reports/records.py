"""What a report is made from, read from a study's directory: the journal, the summary and the trials' metrics.

The journal (``trials.jsonl``) is the truth and is there from the first trial on; ``summary.json`` adds what is worked
out at the end. So a study that still runs, or one that was killed, has a report as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxtune.errors import UserError, nearest
from jaxtune.reports.formatting import finite
from jaxtune.search.header import amended_header
from jaxtune.search.journal import FILENAME as JOURNAL
from jaxtune.search.journal import read_journal
from jaxtune.search.summary import FILENAME as SUMMARY
from jaxtune.search.trial import TrialState, replay
from jaxtune.telemetry.writers import read_metrics

CURVE_POINTS = 240


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """One trial as the journal tells it; what is unknown or not finite is None.

    Attributes:
      id: its number; 0 is the reference configuration.
      configuration: dotted key → value.
      status: running, scored (stopped at the fraction), promoted (being finished), finished, failed.
      early_score: validation score at the fraction.
      early_error: its standard error.
      final_score: validation score at the end.
      reason: why it failed, "" if it did not.
      steps: optimizer steps run.
      total_steps: its full length.
      seconds: time spent on it.
      curve: (step, training loss) pairs.
    """

    id: int
    configuration: dict[str, Any]
    status: str
    early_score: float | None
    early_error: float | None
    final_score: float | None
    reason: str
    steps: int
    total_steps: int | None
    seconds: float | None
    curve: list[tuple[int, float | None]]

    @property
    def reference(self) -> bool:
        """Whether this is the reference configuration, trial 0."""
        return self.id == 0


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """A study as its files tell it.

    Attributes:
      directory: the run directory.
      name: the study's name.
      objective: the metric's name.
      direction: "min" or "max".
      fraction: share of its steps after which a trial is scored.
      planned: how many trials the study is to have.
      space: dotted key → {kind: bounds or choices}.
      config: the configuration that the trials override.
      trials: in order.
      summary: ``summary.json``, {} while the study has none.
    """

    directory: Path
    name: str
    objective: str
    direction: str
    fraction: float
    planned: int
    space: dict[str, dict[str, Any]]
    config: dict[str, Any]
    trials: list[TrialRecord]
    summary: dict[str, Any]

    @property
    def keys(self) -> list[str]:
        """The searched keys."""
        return list(self.space)

    @property
    def finished(self) -> list[TrialRecord]:
        """Trials trained to the end."""
        return [trial for trial in self.trials if trial.status == "finished"]

    def best_first(self, trials: list[TrialRecord], score: str) -> list[TrialRecord]:
        """Trials that have a ``score`` ("early_score" or "final_score"), the best first."""
        present = [trial for trial in trials if getattr(trial, score) is not None]
        return sorted(present, key=lambda trial: getattr(trial, score), reverse=self.direction == "max")


def read_study(directory: Path) -> StudyRecord:
    """Reads a study's directory.

    Raises:
      UserError: there is no study in ``directory``, or one of its files is damaged.
    """
    journal = directory / JOURNAL
    if not journal.is_file():
        raise UserError(_no_study(directory))
    records = read_journal(directory)
    if not records or records[0]["event"] != "study":
        raise UserError(f"{journal}, line 1: no record of a study; the journal is empty or its first line was removed")
    header = amended_header(records, journal)
    history = replay(records[1:], directory, journal)
    config = header.get("config") or {}
    # The reference overrides only what differs from the configuration; figures need all searched keys.
    base = {key: value for key in header["space"] if (value := _find(config, key)) is not None}
    return StudyRecord(
        directory=directory,
        name=_name(directory),
        objective=header["objective"]["name"],
        direction=header["objective"]["direction"],
        fraction=header["fraction"],
        planned=header.get("trials") or len(history.trials),
        space=header["space"],
        config=config,
        trials=[_trial(history.trials[number], base) for number in sorted(history.trials)],
        summary=_read_summary(directory / SUMMARY),
    )


def _trial(state: TrialState, base: Mapping[str, Any]) -> TrialRecord:
    last = state.outcomes[-1] if state.outcomes else None
    reason = ""
    if last is not None and state.failed:
        reason = f"diverged by step {last.steps_run:,}"
    return TrialRecord(
        id=state.trial.id,
        configuration={**base, **state.trial.configuration} if state.trial.id == 0 else state.trial.configuration,
        status="running" if state.status == "proposed" else state.status,
        early_score=finite(state.early.score) if state.early and state.ranked else None,
        early_error=finite(state.early.standard_error) if state.early and state.ranked else None,
        final_score=finite(state.final.score) if state.final and state.finished else None,
        reason=reason,
        steps=max((outcome.steps_run for outcome in state.outcomes), default=0),
        total_steps=state.total_steps,
        seconds=sum(outcome.seconds for outcome in state.outcomes) if state.outcomes else None,
        curve=_read_curve(state.trial.directory / "metrics.jsonl"),
    )


def _find(config: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings and lists; None if there is none."""
    for part in key.split("."):
        if isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, Mapping):
            config = config.get(part)
        else:
            return None
    return config


def _name(directory: Path) -> str:
    """The study's name from its configuration, else its directory's."""
    file = directory / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not valid YAML ({error.__class__.__name__}); restore it from your own copy"
        ) from error
    name = config.get("name") if isinstance(config, dict) else None
    return str(name or directory.resolve().name)


def _read_summary(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not valid JSON ({error}); remove it and run the search again to have it rewritten"
        ) from error
    if not isinstance(summary, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(summary).__name__}")
    return summary


def _read_curve(file: Path) -> list[tuple[int, float | None]]:
    """(step, training loss) of a trial, thinned to what a drawing can show; the last point is always kept."""
    if not file.is_file():
        return []
    points = [(int(record["step"]), finite(record["loss"])) for record in read_metrics(file) if "loss" in record]
    if len(points) <= CURVE_POINTS:
        return points
    stride = len(points) / CURVE_POINTS
    return [*(points[int(index * stride)] for index in range(CURVE_POINTS)), points[-1]]


def _no_study(directory: Path) -> str:
    """Why there is nothing to report on, with the nearest directory that has a study."""
    if (directory / "metrics.jsonl").is_file():
        return f"{directory}: this is a single run, not a study (it has no {JOURNAL}); a report is made of a search"
    problem = f"no study here (it has no {JOURNAL})" if directory.is_dir() else "no such directory"
    return f"{directory}: {problem}{nearest(str(directory), [str(path) for path in _studies_around(directory)])}"


def _studies_around(directory: Path) -> Iterator[Path]:
    """Directories with a study: below the directory itself, and beside it."""
    for parent in (directory, directory.parent):
        if parent.is_dir():
            for found in sorted(parent.glob(f"*/{JOURNAL}")):
                yield found.parent
