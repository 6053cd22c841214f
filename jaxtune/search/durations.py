"""How long a study has taken so far: what is counted, for everyone who tells it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.layout import TrialDirectory
from jaxtune.search.trial import History, TrialState

Interval = tuple[float, float]
"""Begin and end, in seconds since 1970."""


@dataclass(frozen=True)
class Durations:
    """Two times, in seconds.

    Attributes:
      work: what training, scoring and testing took, added up over trials and the untuned model. A trial's own seconds
        are its share of the time where several trained side by side; of several workers each counts. Where the study
        has ended it is ``budget.seconds`` of its summary. Trials under way add what they have trained since the journal
        last told of one of them. This is the time that people are told.
      elapsed: by the clock, while something was trained or tested, however many trials at a time: for the pace.
    """

    work: float
    elapsed: float


def durations(records: Sequence[Mapping[str, Any]], history: History, at_work: Iterable[Interval]) -> Durations:
    """The durations of a study.

    Args:
      records: of its journal, the first one included.
      history: what they tell of its trials.
      at_work: of the trials under way, from :func:`trials_at_work`.
    """
    under_way = list(at_work)
    calls = _calls(records, records[0].get("population") or 1)
    return Durations(recorded_work(history) + covered(under_way), covered([*calls, *under_way]))


def recorded_work(history: History) -> float:
    """Seconds of all calls that a journal tells of, added up; a call that a clock set back made negative took none."""
    states = history.trials.values()
    outcomes = [outcome for state in states for outcome in (*state.outcomes, *state.repeats.values(), state.test)]
    return float(sum(max(0.0, outcome.seconds) for outcome in (*outcomes, history.untuned) if outcome is not None))


def trials_at_work(trials: Mapping[int, TrialState], records: Sequence[Mapping[str, Any]]) -> dict[int, Interval]:
    """Trials that wrote to their files since the journal last told of them, with when this began and the last time.

    The journal says when a trial is proposed and how it ended; that it is training now only its own files tell.

    Args:
      trials: by number.
      records: of the journal.
    """
    told = {record["trial"]: _time(record) for record in records if "steps_run" in record}
    found = {}
    for number, state in trials.items():
        (started, written), since = file_times(state.trial.directory), told.get(number, 0.0)
        if state.status not in ("finished", "stopped", "failed") and written is not None and written > since:
            found[number] = (max(since, started or written), written)
    return found


def file_times(directory: Path) -> tuple[float | None, float | None]:
    """When the present call, or the last one, began to train a trial, and when something of it was last written.

    Args:
      directory: of the trial, which another process may be writing to, and which need not be there yet.
    """
    files = TrialDirectory(directory)
    began, logged = (_modified(file) for file in (files.config_path, files.metrics_path))
    return began, max((time for time in (began, logged) if time is not None), default=None)


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals: what trials that trained together have in common counts once, and the time
    between two processes that ran the study not at all."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _calls(records: Sequence[Mapping[str, Any]], population: int) -> list[Interval]:
    """When each training and test that the journal tells of began and ended.

    A trial's seconds are its share of the time: beside others in the population it took at most ``population`` times as
    long, which leaves out a pause of the study. It began no earlier than the journal's last word on it, which counts
    a trial that had the others' places to itself for what it took.
    """
    calls = []
    before: dict[int | None, float] = {}
    for record in records:
        trial, end, seconds = record.get("trial"), _time(record), record.get("seconds")
        if isinstance(seconds, int | float) and math.isfinite(seconds):
            longest = seconds * population if record["event"] != "tested" else seconds
            calls.append((max(end - longest, before.get(trial, 0.0)), end))
        before[trial] = end
    return calls


def _time(record: Mapping[str, Any]) -> float:
    time = record.get("time")
    return float(time) if isinstance(time, int | float) and math.isfinite(time) else 0.0


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None
