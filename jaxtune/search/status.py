"""Where a study stands, while it runs and after: read from its files alone, without disturbing who runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxtune.config.metrics import Direction
from jaxtune.errors import UserError
from jaxtune.files import Holder, lock_holder
from jaxtune.layout import RunFiles, TrialDirectory
from jaxtune.search.conditions import filled
from jaxtune.search.directory import study_directory
from jaxtune.search.durations import durations, trials_at_work
from jaxtune.search.header import amended_header, searched_values
from jaxtune.search.journal import read_journal
from jaxtune.search.leader import leader
from jaxtune.search.milestones import Shares
from jaxtune.search.objectives import SATISFIED, Objectives, pareto
from jaxtune.search.outcome import Outcome
from jaxtune.search.trial import History, TrialState, replay

STATES = ("waiting", "training", "paused", "scored", "promoted", "finishing", "finished", "stopped", "failed")
"""What a trial can be doing: ``training`` goes on to the fraction, ``finishing`` to the end; ``paused`` was under way
when the study was stopped."""

# Bytes at the end of a trial's metrics that hold its last line.
_TAIL = 65536


@dataclass(frozen=True)
class TrialStatus:
    """Where a trial stands.

    Attributes:
      trial: its number.
      state: one of :data:`STATES`.
      source: what proposed it.
      step: optimizer steps done, as far as they are logged.
      until: the step at which it is scored next, or was scored last; None before it is known.
      early_score: at the fraction; None without one, or where it diverged.
      final_score: at the end; the same.
      rungs: its scores at other steps on the way, by step.
      values: of further objectives and of what is bounded, by name, at the end or else at the fraction.
    """

    trial: int
    state: str
    source: str
    step: int
    until: int | None
    early_score: float | None
    final_score: float | None
    rungs: dict[int, float | None] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands.

    Attributes:
      directory: its run directory.
      objective: name of the score.
      direction: ``min`` or ``max``.
      objectives: names of all objectives, that one first.
      where: bounds by the name of a metric or a counted cost.
      front: numbers of the trials on the Pareto front of several objectives, at the fraction.
      satisfied: whether the best trial satisfies the bounds; None where there is none, or no bound.
      phase: ``scoring``, ``finishing`` (the promoted trials), ``testing``, ``finished``, or ``failed``: every trial
        diverged.
      holder: who runs it; None where nobody does.
      experiment: whose trials these are; None for a search.
      planned: ``search.trials``; how many there are where that is not fixed beforehand.
      promote: ``search.promote``; None for an experiment.
      shares: of a trial's steps, at which it is looked at.
      length: of every trial, in steps; None where they differ, or where none was scored yet.
      fixed: searched keys that are held fast.
      trials: in order.
      best: number of the trial that is ahead (see :func:`~jaxtune.search.leader.leader`).
      steps: optimizer steps run, trials under way included.
      seconds: of training, scoring and testing; ``work`` of :class:`~jaxtune.search.durations.Durations`.
      last: when the last record was written, in seconds since 1970.
    """

    directory: Path
    objective: str
    direction: Direction
    objectives: tuple[str, ...]
    where: dict[str, Any]
    front: list[int]
    satisfied: bool | None
    phase: str
    holder: Holder | None
    experiment: str | None
    planned: int
    promote: int | None
    shares: Shares
    length: int | None
    fixed: dict[str, Any]
    trials: list[TrialStatus]
    best: int | None
    steps: int
    seconds: float
    last: float

    def count(self, *states: str) -> int:
        """How many trials are in one of these states."""
        return sum(trial.state in states for trial in self.trials)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        best = next((trial for trial in self.trials if trial.trial == self.best), None)
        return {
            "run_dir": str(self.directory),
            "phase": self.phase,
            "running": None if self.holder is None else dataclasses.asdict(self.holder),
            "objective": {"name": self.objective, "direction": self.direction},
            "objectives": list(self.objectives),
            "where": self.where,
            "pareto": self.front,
            "satisfied": self.satisfied,
            "experiment": self.experiment,
            "planned": self.planned,
            "promote": self.promote,
            "ladder": list(self.shares.ladder),
            "fraction": self.shares.fraction,
            "finish": list(self.shares.finish),
            "length": self.length,
            "fixed": self.fixed,
            "proposed": len(self.trials),
            **{state: self.count(state) for state in STATES},
            "best": None
            if best is None
            else {"trial": best.trial, "early_score": best.early_score, "final_score": best.final_score},
            "steps": self.steps,
            "seconds": self.seconds,
            "idle_seconds": max(0.0, time.time() - self.last),
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
        }


@dataclass(frozen=True)
class Recorded:
    """A study's journal, read.

    Attributes:
      directory: the run directory.
      header: the first record with later changes in it.
      records: all records.
      history: what they tell of the trials.
      ended: whether the study has its summary.
    """

    directory: Path
    header: dict[str, Any]
    records: list[dict[str, Any]]
    history: History
    ended: bool

    @property
    def objectives(self) -> Objectives:
        """What it is after."""
        return Objectives.recorded(self.header)

    @property
    def leader(self) -> TrialState | None:
        """The trial that is ahead."""
        return leader(self.history, self.objectives, ended=self.ended)

    @property
    def sources(self) -> dict[int, str]:
        """What proposed each trial."""
        return {record["trial"]: record.get("source", "") for record in self.records if record["event"] == "proposed"}

    @property
    def shares(self) -> Shares:
        """Shares of a trial's steps at which it is looked at."""
        return Shares.of(self.header)

    def configuration(self, state: TrialState) -> dict[str, Any]:
        """A trial's configuration with every searched key that applies to it."""
        return filled(searched_values(self.header), state.trial.configuration)


def read_recorded(run_dir: str | os.PathLike[str]) -> Recorded:
    """Reads a study's journal; takes no lock and changes nothing.

    Raises:
      UserError: there is no study, or its journal is damaged.
    """
    directory = study_directory(run_dir)
    files = RunFiles(directory)
    path = files.journal_path
    # The summary is looked for first: with one, the journal read after it is whole.
    ended = files.summary_path.is_file()
    records = read_journal(directory)
    header = amended_header(records, path)
    for name in ("space", "objective", "fraction"):
        if name not in header:
            raise UserError(f"{path}, line 1: the record of the study lacks {name!r}; restore it")
    return Recorded(directory, header, records, replay(records[1:], directory, path), ended)


def read_status(run_dir: str | os.PathLike[str]) -> StudyStatus:
    """Where the study in a directory stands.

    Raises:
      UserError: there is no study, or its journal is damaged.
    """
    # The lock is looked at first: a study that ends in between is then shown with its last records.
    holder = lock_holder(RunFiles(run_dir).study_lock_path)
    recorded = read_recorded(run_dir)
    header, history, sources = recorded.header, recorded.history, recorded.sources
    objectives = recorded.objectives
    trials = [
        _trial_status(state, sources.get(number, ""), recorded.shares, holder is not None, objectives)
        for number, state in sorted(history.trials.items())
    ]
    best = recorded.leader
    at_work = {} if recorded.ended else trials_at_work(history.trials, recorded.records)
    return StudyStatus(
        directory=recorded.directory,
        objective=header["objective"]["name"],
        direction=header["objective"]["direction"],
        objectives=objectives.names,
        where=header["where"],
        front=[entry["trial"] for entry in pareto(objectives, history.trials)] if objectives.several else [],
        satisfied=_satisfied(objectives, best),
        phase=_phase(recorded),
        holder=holder,
        experiment=header.get("experiment"),
        planned=header.get("trials") or len(trials),
        promote=header.get("promote"),
        shares=recorded.shares,
        length=history.length,
        fixed=header["fixed"],
        trials=trials,
        best=None if best is None else best.trial.id,
        steps=sum(trial.step for trial in trials) + sum(_repeated(state) for state in history.trials.values()),
        seconds=durations(recorded.records, history, at_work.values()).work,
        last=recorded.records[-1].get("time") or 0.0,
    )


def _repeated(state: TrialState) -> int:
    """Steps of a trial's repetitions with other seeds."""
    return sum(outcome.steps_run for outcome in state.repeats.values())


def score_of(outcome: Outcome | None) -> float | None:
    """A score that counts, or None."""
    return None if outcome is None or outcome.failed else outcome.score


def logged_step(directory: Path) -> int | None:
    """The last step that a trial has logged: 0 where it has only begun, None where it has not."""
    file = TrialDirectory(directory).metrics_path
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        # The end alone: a status that is asked for every second must not read all of a long trial.
        stream.seek(max(0, file.stat().st_size - _TAIL))
        for line in reversed(stream.read().split(b"\n")):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
    return 0


def _satisfied(objectives: Objectives, best: TrialState | None) -> bool | None:
    if best is None or not objectives.where:
        return None
    return objectives.violation(best, best.final or best.early) == SATISFIED


def _trial_status(state: TrialState, source: str, shares: Shares, runs: bool, objectives: Objectives) -> TrialStatus:
    name, step = state.status, max((outcome.steps_run for outcome in state.outcomes), default=0)
    following = None if state.total_steps is None else shares.steps(state.total_steps).after(step)
    until = following if name == "promoted" else step
    if name == "proposed":
        logged = logged_step(state.trial.directory)
        # At a rung of the ladder it waits for the others, and nothing of it is logged until it goes on.
        idle = logged is None or (state.waits and logged <= step)
        name = "waiting" if idle else "training" if runs else "paused"
        step, until = max(logged or 0, step), _next_step(state.trial.directory, shares, step)
    elif name == "promoted" or (name == "scored" and state.trial.id == 0):
        # The reference is finished as well, without a promotion.
        logged = logged_step(state.trial.directory) or 0
        if logged > step:
            name, step, until = "finishing" if runs else "paused", logged, following
    return TrialStatus(
        trial=state.trial.id,
        state=name,
        source=source,
        step=step,
        until=until,
        early_score=score_of(state.early),
        final_score=score_of(state.final),
        rungs={at: score_of(outcome) for at, outcome in sorted({**state.rungs, **state.finishing}.items())},
        values={name: objectives.value(name, state, state.final or state.early) for name in objectives.shown},
    )


def _next_step(directory: Path, shares: Shares, step: int) -> int | None:
    """The step at which a trial that has begun is scored next, from its own configuration; None where there is none.

    Args:
      directory: its files.
      shares: of its steps at which trials are scored.
      step: at which it was scored last.
    """
    try:
        config = yaml.safe_load(TrialDirectory(directory).config_path.read_text(encoding="utf-8"))
        total = config["train"]["steps"]
        return shares.steps(total).after(step) if isinstance(total, int) else None
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _phase(recorded: Recorded) -> str:
    states = recorded.history.trials.values()
    if recorded.ended:
        return "finished"
    planned = len(states) if recorded.history.enough else recorded.header.get("trials") or 1
    if sum(bool(state.outcomes) for state in states) < planned:
        return "scoring"
    if all(state.failed for state in states):
        return "failed"
    return "testing" if recorded.records[-1]["event"] == "tested" else "finishing"
