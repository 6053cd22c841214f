"""The last few of a study, trained again with other seeds: the winner is the best on average, not the luckiest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxtune.config.metrics import Goal
from jaxtune.search.header import lookup
from jaxtune.search.ledger import Ledger
from jaxtune.search.objectives import Objectives
from jaxtune.search.runner import TrialRunner, run_all
from jaxtune.search.settings import Settings
from jaxtune.search.statistics import t_interval
from jaxtune.search.trial import History, Trial, TrialState

SEED = "train.seed"
FINALISTS = 3
"""How many are repeated: behind the third of a few finished trials hardly ever stands the best one."""
CONFIDENCE = 0.95


def finalists(history: History, objectives: Objectives) -> list[TrialState]:
    """The trials that are repeated: the best of those trained to the end, the reference perhaps among them.

    Those that satisfy the bounds come first.
    """
    finished = [
        (objectives.violation(state, state.final), objectives.goal.signed(state.final.score), number)
        for number, state in history.trials.items()
        if state.final is not None and state.finished
    ]
    return [history.trials[number] for *_, number in sorted(finished)[:FINALISTS]]


def repeat(settings: Settings, ledger: Ledger, runner: TrialRunner) -> None:
    """Trains each finalist with the seeds that follow its own, so that there are ``search.seeds`` trainings of it.

    A training that diverges is an outcome, and its trial does not win.

    Raises:
      Interrupted: it was told to stop; the trainings that have ended are in the journal.
    """
    for further in range(1, settings.search.seeds):
        # Seed by seed: a runner tells trials apart by their numbers.
        due = {
            state.trial.id: _again(state.trial, first_seed(settings, state.trial) + further)
            for state in finalists(ledger.history, settings.objectives)
        }
        due = {number: one for number, one in due.items() if one[1] not in ledger.history.trials[number].repeats}

        def jobs(due: dict[int, tuple[Trial, int]] = due) -> Iterator[tuple[Trial, int]]:
            for trial, _ in due.values():
                ledger.check_stop()
                ledger.start(trial, runner.total_steps(trial), "final")
                yield trial, runner.total_steps(trial)

        for trial, outcome in run_all(runner, jobs()):
            record = ledger.scored(trial, runner.total_steps(trial), outcome, runner)
            # The trial's own, by which its records are known.
            record["configuration"] = ledger.history.trials[trial.id].trial.configuration
            ledger.append("repeated", **record, seed=due[trial.id][1])


def first_seed(settings: Settings, trial: Trial) -> int:
    """The seed that a trial itself was trained with."""
    if SEED in trial.configuration:
        return int(trial.configuration[SEED])
    try:
        return int(lookup(settings.base, SEED))
    except KeyError:
        return 0


def _again(trial: Trial, seed: int) -> tuple[Trial, int]:
    directory = trial.directory.with_name(f"{trial.directory.name}-seed-{seed}")
    return Trial(trial.id, {**trial.configuration, SEED: seed}, directory), seed


def repeats_summary(history: History, goal: Goal, seeds: int) -> dict[str, Any]:
    """Mean and interval of each finalist, best first; nothing where none was repeated."""
    rows = []
    for state in history.trials.values():
        if not state.repeats:
            continue
        scores = [None if outcome.failed else outcome.score for outcome in state.ends]
        sound = [score for score in scores if score is not None]
        # With a seed that diverged there is no mean to speak of.
        mean, low, high = t_interval(sound if len(sound) == len(scores) else [], CONFIDENCE)
        rows.append({"trial": state.trial.id, "scores": scores, "mean": mean, "low": low, "high": high})
    rows.sort(key=lambda row: (row["mean"] is None, 0.0 if row["mean"] is None else goal.signed(row["mean"])))
    return {"seeds": {"count": seeds, "confidence": CONFIDENCE, "trials": rows}} if rows else {}
