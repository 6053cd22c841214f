"""One trial of a study in full: what it was given, how it went, how to run it by itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config.metrics import VALIDATION_LOSS
from jaxtune.errors import UserError, nearest
from jaxtune.search.directory import train_command
from jaxtune.search.journal import plain
from jaxtune.search.outcome import Outcome
from jaxtune.search.status import read_recorded, score_of
from jaxtune.telemetry.writers import read_metrics


def trial_details(run_dir: str | os.PathLike[str], trial: int | str) -> dict[str, Any]:
    """What the journal and the metrics tell of one trial.

    Args:
      run_dir: the study's run directory.
      trial: the trial's number.

    Returns:
      ``trial``, ``status``, ``source`` with the trials ``told`` and ``pending`` when it was proposed,
      ``configuration``, ``costs`` (counted ones that the study names), ``early``, ``final`` and ``test`` (None where
      there is no such outcome), ``rungs`` (the outcomes at other steps on the way, in their order), ``repeats`` (those
      at the end with other seeds, by seed), ``promoted`` (``rank``, ``estimate``), ``curve`` and ``validation_curve``
      as ``[step, loss]`` pairs, ``directory`` and ``command``.

    Raises:
      UserError: there is no study or no such trial, or the journal is damaged.
    """
    recorded = read_recorded(run_dir)
    trials = recorded.history.trials
    state = trials.get(int(trial)) if str(trial).isdigit() else None
    if state is None:
        there = f"{recorded.directory} has trials {min(trials)} to {max(trials)}" if trials else "there is none yet"
        raise UserError(f"trial {trial}: no such trial; {there}{nearest(trial, sorted(trials), listed=False)}")
    mine = [record for record in recorded.records if record.get("trial") == state.trial.id]
    proposed = next(record for record in mine if record["event"] == "proposed")
    promoted = next((record for record in mine if record["event"] == "promoted"), None)
    file = state.trial.files.metrics_path
    metrics = read_metrics(file) if file.is_file() else []
    target = Path(f"{recorded.directory}-trial-{state.trial.id:03d}")
    return plain(
        {
            "trial": state.trial.id,
            "status": state.status,
            **{key: proposed.get(key) for key in ("source", "told", "pending")},
            "configuration": recorded.configuration(state),
            "costs": dict(state.costs),
            "total_steps": state.total_steps,
            "early": _outcome(state.early),
            "rungs": [_outcome(outcome) for outcome in state.between],
            "final": _outcome(state.final),
            "repeats": {seed: _outcome(outcome) for seed, outcome in sorted(state.repeats.items())},
            "test": None
            if state.test is None
            else {"score": state.test.score, "metrics": state.test.metrics, "seconds": state.test.seconds},
            "promoted": None if promoted is None else {key: promoted.get(key) for key in ("rank", "estimate")},
            "curve": _curve(metrics, "loss"),
            "validation_curve": _curve(metrics, VALIDATION_LOSS),
            "directory": str(state.trial.directory),
            "command": train_command(recorded.directory, state.trial.configuration, str(target)),
        }
    )


def _outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    """An outcome as JSON holds it; a score that does not count is None."""
    return None if outcome is None else {**dataclasses.asdict(outcome), "score": score_of(outcome)}


def _curve(metrics: Sequence[Mapping[str, Any]], name: str) -> list[list[Any]]:
    return [[record["step"], record[name]] for record in metrics if name in record]
