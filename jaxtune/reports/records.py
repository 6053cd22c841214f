"""What a report is made from, read from a study's directory: the journal, the summary and the trials' metrics.

The journal (``trials.jsonl``) is the truth and is there from the first trial on; ``summary.json`` adds what is worked
out at the end. So a study that still runs, or one that was killed, has a report as well. Nothing here takes the study's
lock or writes: a study is read while another process runs it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxtune.config.metrics import VALIDATION_LOSS, Goal
from jaxtune.errors import UserError
from jaxtune.layout import RunFiles
from jaxtune.reports.formatting import finite
from jaxtune.reports.trial_files import Curve, TrialFiles, read_trial_files
from jaxtune.search.conditions import filled
from jaxtune.search.durations import Durations, durations, trials_at_work
from jaxtune.search.header import searched_values
from jaxtune.search.status import Recorded, read_recorded, score_of
from jaxtune.search.trial import TrialState


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """One trial as the journal tells it; what is unknown or not finite is None.

    Attributes:
      id: its number; 0 is the reference configuration.
      configuration: dotted key → value.
      status: waiting (proposed, not begun, or at a rung of the ladder), running, stopped (before the fraction), scored
        (at the fraction, or at a rung after it), promoted (on its way to the next rung or the end), finished, failed.
      training: it is being trained, as far as the files tell; several trials may be at the same time.
      early_score: validation score at the fraction.
      early_error: its standard error.
      final_score: validation score at the end.
      reason: why it failed, "" if it did not.
      steps: optimizer steps run; of one that trains, those logged so far.
      total_steps: its full length; None until it is scored.
      seconds: how long it trained; its share of the time where several trials trained together.
      curve: (step, training loss) pairs.
      validation: (step, validation loss) pairs.
      rungs: validation scores before the fraction, by step.
      finishing: those between the fraction and the end.
    """

    id: int
    configuration: dict[str, Any]
    status: str
    training: bool
    early_score: float | None
    early_error: float | None
    final_score: float | None
    reason: str
    steps: int
    total_steps: int | None
    seconds: float | None
    curve: Curve
    validation: Curve
    rungs: Mapping[int, float | None] = dataclasses.field(default_factory=dict)
    finishing: Mapping[int, float | None] = dataclasses.field(default_factory=dict)

    @property
    def reference(self) -> bool:
        """Whether this is the reference configuration, trial 0."""
        return self.id == 0


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """A study as its files tell it.

    Attributes:
      recorded: its journal.
      name: the study's name.
      trials: in order.
      summary: ``summary.json``, {} while the study has none.
      durations: how long it has taken so far.
      written: when the study last wrote something, in seconds since the epoch.
    """

    recorded: Recorded
    name: str
    trials: list[TrialRecord]
    summary: dict[str, Any]
    durations: Durations
    written: float

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.recorded.directory

    @property
    def objective(self) -> str:
        """The metric's name."""
        return self.recorded.header["objective"]["name"]

    @property
    def goal(self) -> Goal:
        """Which way scores are better."""
        return Goal.of(self.recorded.header["objective"])

    @property
    def fraction(self) -> float:
        """Share of its steps after which a trial is scored."""
        return self.recorded.header["fraction"]

    @property
    def planned(self) -> int:
        """How many trials the study is to have."""
        return self.recorded.header.get("trials") or len(self.trials)

    @property
    def promote(self) -> int:
        """How many of them are to be finished, besides the reference."""
        return self.recorded.header.get("promote") or 0

    @property
    def space(self) -> dict[str, dict[str, Any]]:
        """Dotted key → {kind: bounds or choices}."""
        return self.recorded.header["space"]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the trials override."""
        return self.recorded.header.get("config") or {}

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
        return sorted(present, key=lambda trial: self.goal.signed(getattr(trial, score)))


def read_study(directory: Path) -> StudyRecord:
    """Reads a study's directory.

    Raises:
      UserError: there is no study in ``directory``, or one of its files is damaged.
    """
    recorded = read_recorded(directory)
    records, history = recorded.records, recorded.history
    summary = _read_summary(RunFiles(directory).summary_path) if recorded.ended else {}
    # The reference overrides only what differs from the configuration; figures need all searched keys.
    base = {key: value for key, value in searched_values(recorded.header).items() if value is not None}
    files = {number: read_trial_files(state.trial.directory) for number, state in history.trials.items()}
    at_work = trials_at_work(history.trials, records) if not summary else {}
    written = [_time(records[-1]), *(file.written for file in files.values() if file.written is not None)]
    return StudyRecord(
        recorded=recorded,
        name=_name(directory),
        trials=[_trial(history.trials[n], files[n], base, training=n in at_work) for n in sorted(history.trials)],
        summary=summary,
        durations=durations(records, history, at_work.values()),
        written=max(written) if not summary else _time(records[-1]),
    )


def _time(record: Mapping[str, Any]) -> float:
    return finite(record.get("time")) or 0.0


def _trial(state: TrialState, files: TrialFiles, base: Mapping[str, Any], *, training: bool) -> TrialRecord:
    last = state.outcomes[-1] if state.outcomes else None
    reason = ""
    if last is not None and state.failed:
        reason = f"diverged by step {last.steps_run:,}"
    status = state.status
    if status == "proposed":
        status = "running" if training else "waiting"
    elif training:
        status = "promoted"  # the reference is finished without a record that says so
    run = max((outcome.steps_run for outcome in state.outcomes), default=0)
    return TrialRecord(
        id=state.trial.id,
        configuration=filled(base, state.trial.configuration) if state.trial.id == 0 else state.trial.configuration,
        status=status,
        training=training,
        early_score=finite(state.early.score) if state.early and state.ranked else None,
        early_error=finite(state.early.standard_error) if state.early and state.ranked else None,
        final_score=finite(state.final.score) if state.final and state.finished else None,
        reason=reason,
        steps=max(run, files.step) if training else run,
        total_steps=state.total_steps,
        seconds=sum(outcome.seconds for outcome in state.outcomes) if state.outcomes else None,
        curve=files.training,
        validation=_validation(state, files),
        rungs={step: score_of(outcome) for step, outcome in state.rungs.items()},
        finishing={step: score_of(outcome) for step, outcome in state.finishing.items()},
    )


def _validation(state: TrialState, files: TrialFiles) -> Curve:
    """The validation losses of the trial's metrics, and those that only the journal has."""
    scored = [outcome for outcome in state.outcomes if not outcome.failed and VALIDATION_LOSS in outcome.metrics]
    losses = {outcome.steps_run: finite(outcome.metrics[VALIDATION_LOSS]) for outcome in scored}
    return sorted({**losses, **dict(files.validation)}.items())


def _name(directory: Path) -> str:
    """The study's name from its configuration, else its directory's."""
    file = RunFiles(directory).config_path
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
