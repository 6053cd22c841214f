"""A trial: one configuration, where its files lie, and what the journal tells of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.layout import RunFiles, TrialDirectory
from jaxtune.search.outcome import Outcome, TestOutcome


@dataclass(frozen=True)
class Trial:
    """One configuration to train.

    Attributes:
      id: its number; 0 is the reference.
      configuration: dotted overrides of the study's configuration, plain Python values.
      directory: its run directory (``trials/000``), which holds its metrics and checkpoints.
    """

    id: int
    configuration: dict[str, Any]
    directory: Path

    @property
    def files(self) -> TrialDirectory:
        """What lies where in its directory."""
        return TrialDirectory(self.directory)


@dataclass
class TrialState:
    """What the journal tells of a trial.

    Attributes:
      trial: the trial.
      known: the trials that were scored when it was proposed.
      total_steps: its full length in optimizer steps; None until it is scored.
      rungs: the outcomes before the fraction at which it might have been stopped, by step.
      waits: whether it waits at the last of them, until all others are there.
      stopped: whether it was, for good, before the fraction.
      early: the outcome at the fraction.
      finishing: the outcomes at the rungs between the fraction and the end, by step.
      final: the outcome at the end.
      repeats: the outcomes of the same trial at the end with other seeds, by seed.
      promoted: whether it was chosen to go on, after the fraction, and has not come to its next score yet.
      test: its outcome on the test split.
      costs: counted costs of its configuration, by name; empty where the study names none.
      compilations: 1 where it is the first trial of its program, else 0; of journals of an earlier version, how often
        the train step was compiled while it ran.
    """

    trial: Trial
    known: tuple[int, ...] = ()
    total_steps: int | None = None
    rungs: dict[int, Outcome] = field(default_factory=dict)
    waits: bool = False
    stopped: bool = False
    early: Outcome | None = None
    finishing: dict[int, Outcome] = field(default_factory=dict)
    final: Outcome | None = None
    repeats: dict[int, Outcome] = field(default_factory=dict)
    promoted: bool = False
    test: TestOutcome | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    compilations: int = 0

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes so far, early one first."""
        rungs, finishing = ([at[step] for step in sorted(at)] for at in (self.rungs, self.finishing))
        scored = [*rungs, self.early, *finishing, self.final]
        return [outcome for outcome in scored if outcome is not None]

    @property
    def between(self) -> list[Outcome]:
        """The outcomes at rungs, before the fraction and after, in the order of their steps."""
        at = {**self.rungs, **self.finishing}
        return [at[step] for step in sorted(at)]

    def at(self, step: int) -> Outcome | None:
        """The outcome at a rung, before the fraction or after."""
        return self.rungs.get(step, self.finishing.get(step))

    def went(self, leg: int) -> Outcome | None:
        """The outcome at a share of ``search.finish``, by its place there; that of a divergence on the way there."""
        outcomes = [*(self.finishing[step] for step in sorted(self.finishing)), self.final]
        return outcomes[leg] if leg < len(outcomes) else None

    def passed(self, leg: int) -> bool:
        """Whether it has come to a share of ``search.finish``, by its place there, or to the end."""
        return len(self.finishing) > leg or self.finished

    @property
    def ends(self) -> list[Outcome]:
        """The outcomes at the end, of the trial itself and of its repetitions with other seeds, in their order."""
        own = [] if self.final is None else [self.final]
        return [*own, *(self.repeats[seed] for seed in sorted(self.repeats))]

    @property
    def mean(self) -> float | None:
        """The mean of its scores at the end; None without one, or where it diverged with any seed."""
        if not self.ends or any(outcome.failed for outcome in self.ends):
            return None
        return sum(outcome.score for outcome in self.ends) / len(self.ends)

    @property
    def steps_run(self) -> int:
        """Optimizer steps of the trial, its repetitions included."""
        own = max((outcome.steps_run for outcome in self.outcomes), default=0)
        return own + sum(outcome.steps_run for outcome in self.repeats.values())

    @property
    def ended(self) -> bool:
        """Whether its early phase is over: scored, diverged or stopped."""
        return self.early is not None or self.stopped

    @property
    def failed(self) -> bool:
        """Whether it diverged, before the fraction or after."""
        return any(outcome.failed for outcome in self.outcomes)

    @property
    def ranked(self) -> bool:
        """Whether it has an early score that counts."""
        return self.early is not None and not self.early.failed

    @property
    def finished(self) -> bool:
        """Whether it has a final score that counts."""
        return self.final is not None and not self.final.failed

    @property
    def status(self) -> str:
        """``proposed``, ``stopped``, ``scored``, ``promoted``, ``finished`` or ``failed``."""
        if self.failed:
            return "failed"
        if self.stopped:
            return "stopped"
        if self.finished:
            return "finished"
        if self.promoted:
            return "promoted"
        return "scored" if self.ranked else "proposed"


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome as fields of a journal record."""
    return {
        "score": None if outcome.failed else outcome.score,
        "standard_error": outcome.standard_error,
        "steps_run": outcome.steps_run,
        "metrics": outcome.metrics,
        "seconds": outcome.seconds,
        "diverged": outcome.failed,
    }


def _number(value: Any) -> float:
    """A recorded number; null stands for one that was not finite.

    Raises:
      TypeError: it is something else.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def read_outcome(record: Mapping[str, Any]) -> Outcome:
    """The outcome that a journal record (``scored``, ``finished``, ``failed``) tells."""
    return Outcome(
        score=_number(record["score"]),
        standard_error=None if record["standard_error"] is None else _number(record["standard_error"]),
        steps_run=int(_number(record["steps_run"])),
        seconds=_number(record["seconds"]),
        metrics={name: _number(value) for name, value in record["metrics"].items()},
        diverged=record["diverged"],
    )


def test_fields(outcome: TestOutcome) -> dict[str, Any]:
    """A test outcome as fields of a journal record."""
    return {
        "score": outcome.score,
        "metrics": outcome.metrics,
        "seconds": outcome.seconds,
        "per_example": outcome.per_example,
        "weights": outcome.weights,
        "strata": outcome.strata,
        "clusters": outcome.clusters,
    }


def _test_outcome(record: Mapping[str, Any]) -> TestOutcome:
    per_example = record["per_example"]
    return TestOutcome(
        score=_number(record["score"]),
        metrics={name: _number(value) for name, value in record["metrics"].items()},
        per_example=None if per_example is None else [_number(value) for value in per_example],
        weights=record["weights"],
        strata=record["strata"],
        clusters=record["clusters"],
        seconds=record["seconds"],
    )


@dataclass
class History:
    """All trials of a study, as its journal tells them.

    Attributes:
      trials: by number.
      promoted: numbers in the order of promotion, by the place in ``search.finish`` of the share that they go on to. A
        change of the study opens the rankings anew: of those promoted before it, only the ones that are still on their
        way there stay first in line.
      lost: numbers of those that had diverged, at whatever step, when the study was changed. Rankings made since know
        of it; what diverges while they are carried out changes none, so that a study that was killed repeats them.
      reports: trial and step of every score before the fraction, in the order in which they came.
      untuned: the base model on the test split.
      enough: the record of why no trial is proposed any more, though there are fewer than planned; None without one.
      prior_dropped: the first trial that was proposed without the priors of the space, as scores contradicted them,
        and how many scores those were; None where they hold, or there are none.
      programs: names of the compiled steps that trained the trials that have an outcome.
      clock: steps since the beginning, where trials before the fraction take one each at a time.
      begun: the clock when each trial was proposed.
      legs: of each trial, the place of the record after which it trains to where it is scored next.
    """

    trials: dict[int, TrialState] = field(default_factory=dict)
    promoted: dict[int, list[int]] = field(default_factory=dict)
    lost: frozenset[int] = frozenset()
    reports: list[tuple[int, int]] = field(default_factory=list)
    untuned: TestOutcome | None = None
    enough: dict[str, Any] | None = None
    prior_dropped: tuple[int, int] | None = None
    programs: set[str] = field(default_factory=set)
    clock: int = 0
    begun: dict[int, int] = field(default_factory=dict)
    legs: dict[int, int] = field(default_factory=dict)
    _records: int = 0

    def compiled(self, program: str) -> dict[str, Any]:
        """What the record of an outcome tells of the trial's program, however many processes compile that one."""
        return {"program": program, "compilations": int(program not in self.programs)}

    @property
    def length(self) -> int | None:
        """The steps of every trial; None where they differ, or where none has an outcome yet."""
        lengths = {state.total_steps for state in self.trials.values()} - {None}
        return lengths.pop() if len(lengths) == 1 else None

    def apply(self, record: Mapping[str, Any], run_dir: Path) -> None:
        """Takes in one record after the first.

        Raises:
          KeyError: it names a trial that was not proposed, or lacks a field.
          ValueError: its event is unknown.
        """
        event = record["event"]
        self._records += 1
        if event == "proposed":
            number = record["trial"]
            self.begun[number], self.legs[number] = self.clock, self._records
            trial = Trial(number, record["configuration"], RunFiles(run_dir).trial(number).path)
            self.trials[number] = TrialState(trial, self._scored(), costs=record.get("costs", {}))
            if "prior_dropped" in record:
                self.prior_dropped = number, record["prior_dropped"]
            return
        if event == "changed":
            self.promoted = {
                leg: [number for number in numbers if self._on_the_way(number, leg)]
                for leg, numbers in self.promoted.items()
            }
            self.lost = frozenset(number for number, state in self.trials.items() if state.failed)
            self.enough = None
            if self.trials:
                # The next proposal need not take for pending what is long scored.
                self.trials[max(self.trials)].known = self._scored()
            return
        if event == "data":
            return
        if event == "enough":
            self.enough = dict(record)
            return
        if event == "tested" and record["trial"] is None:
            self.untuned = _test_outcome(record)
            return
        state = self.trials[record["trial"]]
        if event == "promoted":
            state.promoted = True
            self.promoted.setdefault(record.get("leg", 0), []).append(state.trial.id)
        elif event == "tested":
            state.test = _test_outcome(record)
        elif event == "stopped":
            # Journals of an earlier version call trials stopped that had been scored.
            state.stopped = state.early is None
        elif event in ("reported", "scored", "finished", "failed", "repeated"):
            state.total_steps = record["total_steps"]
            state.compilations += record["compilations"]
            if "program" in record:
                self.programs.add(record["program"])
            if event == "repeated":
                state.repeats[record["seed"]] = read_outcome(record)
                return
            if record.get("phase") != "final":
                self.clock = max(self.clock, self.begun[state.trial.id] + int(record["steps_run"]))
                self.legs[state.trial.id] = self._records
            if event == "reported" and record.get("phase") == "final":
                state.finishing[record["step"]] = read_outcome(record)
                state.promoted = False
            elif event == "reported":
                state.rungs[record["step"]] = read_outcome(record)
                self.reports.append((state.trial.id, record["step"]))
                state.waits = record.get("waits", False)
            elif record["phase"] == "early":
                state.early = read_outcome(record)
            else:
                state.final = read_outcome(record)
        else:
            raise ValueError(f"unknown event {event!r}")

    def _on_the_way(self, number: int, leg: int) -> bool:
        state = self.trials[number]
        return state.final is None and not state.passed(leg)

    def _scored(self) -> tuple[int, ...]:
        return tuple(index for index, state in self.trials.items() if state.ended or state.waits)


def replay(records: Sequence[Mapping[str, Any]], run_dir: Path, path: Path) -> History:
    """The history that a journal's records (the first one, ``study``, left out) tell.

    Raises:
      UserError: a record does not follow from those before it; names its line.
    """
    history = History()
    for line, record in enumerate(records, start=2):
        try:
            history.apply(record, run_dir)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {line}: the record does not follow from those before it ({error!r}); restore the line, "
                f"or cut the file before it to run the later trials again"
            ) from error
    return history
