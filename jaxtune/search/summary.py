"""``summary.json``: the end of a study, for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.evaluation.statistics import paired_bootstrap
from jaxtune.files import write_atomically
from jaxtune.layout import RunFiles
from jaxtune.search.dependence import partial_dependence
from jaxtune.search.durations import recorded_work
from jaxtune.search.journal import plain
from jaxtune.search.milestones import Shares
from jaxtune.search.objectives import SATISFIED, Objectives, pareto, recorded_where
from jaxtune.search.outcome import TestOutcome
from jaxtune.search.repeats import repeats_summary
from jaxtune.search.statistics import rank_agreement
from jaxtune.search.surrogate import Posterior
from jaxtune.search.trial import History, TrialState


def _score(state: TrialState, which: str) -> float | None:
    outcome = state.early if which == "early" else state.final
    return None if outcome is None or outcome.failed else outcome.score


def _tested(outcome: TestOutcome | None) -> dict[str, Any]:
    return {
        "test_score": None if outcome is None else outcome.score,
        "test_metrics": None if outcome is None else outcome.metrics,
    }


def _entry(state: TrialState) -> dict[str, Any]:
    final = state.final
    return {
        "trial": state.trial.id,
        "configuration": state.trial.configuration,
        "early_score": _score(state, "early"),
        "final_score": _score(state, "final"),
        "final_metrics": None if final is None else final.metrics,
        **_tested(state.test),
    }


def _difference(best: TrialState, baseline: TrialState) -> dict[str, Any] | None:
    """The winner's test score minus the reference's, with its paired bootstrap interval."""
    first, second = best.test, baseline.test
    if best is baseline or first is None or second is None or first.per_example is None or second.per_example is None:
        return None
    count = len(first.per_example)
    weights = np.ones(count) if first.weights is None else np.asarray(first.weights, np.float64)
    one, other = (
        np.where(weights > 0, np.asarray(scores, np.float64) * weights, 0.0)
        for scores in (first.per_example, second.per_example)
    )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    difference = paired_bootstrap(one, other, weights, strata=first.strata, clusters=first.clusters)
    return {**dataclasses.asdict(difference), "examples": int((weights > 0).sum())}


def _finish(history: History, shares: Shares, promote: int) -> dict[str, Any]:
    """How many were to go on to each rung after the fraction, and their scores there; nothing without such a rung."""
    if len(shares.finish) == 1:
        return {}
    rungs, length = [], history.length
    steps = [None] * len(shares.finish) if length is None else shares.steps(length).legs
    for leg, (share, step, number) in enumerate(zip(shares.finish, steps, shares.promotions(promote), strict=True)):
        outcomes = {trial: state.went(leg) for trial, state in sorted(history.trials.items())}
        scores = [
            {"trial": trial, "score": outcome.score}
            for trial, outcome in outcomes.items()
            if outcome is not None and not outcome.failed
        ]
        rungs.append({"share": share, "step": step, "promoted": number, "trials": scores})
    return {"finish": rungs}


def _further(history: History, best: TrialState, objectives: Objectives) -> dict[str, Any]:
    """What a summary tells of several objectives and of bounds; nothing where there are none."""
    told: dict[str, Any] = {}
    if objectives.several:
        goals = zip(objectives.names, objectives.goals(), strict=True)
        told["objectives"] = [{"name": name, "direction": goal.direction} for name, goal in goals]
        told["pareto"] = pareto(objectives, history.trials)
    if objectives.where:
        told["where"] = {
            "bounds": recorded_where(objectives.where),
            "satisfied": objectives.violation(best, best.final) == SATISFIED,
            "best": {name: objectives.value(name, best, best.final) for name in objectives.where},
        }
    return told


def _dropped(history: History) -> dict[str, Any]:
    """From which trial on the priors of the space did not count, and by how many scores; nothing where they held."""
    if history.prior_dropped is None:
        return {}
    trial, scores = history.prior_dropped
    return {"prior_dropped": {"trial": trial, "scores": scores}}


def build_summary(
    history: History,
    best: TrialState,
    *,
    objectives: Objectives,
    shares: Shares,
    top_k: int,
    seeds: int,
    posterior: Posterior | None,
    reference_in_space: bool,
) -> dict[str, Any]:
    """The summary of a study whose trials are all scored and whose best one is known.

    Args:
      history: what the journal tells.
      best: the finished trial with the best final score.
      objectives: the first is the score.
      shares: of its steps, after which a trial was scored.
      top_k: size of the leading groups that are compared.
      seeds: trainings of each finalist, its own among them.
      posterior: the surrogate fitted to all scores; None where there were too few.
      reference_in_space: whether the surrogate was told of trial 0.
    """
    sign = objectives.goal.sign
    states = [history.trials[number] for number in sorted(history.trials)]
    baseline = history.trials[0]
    early = [math.inf if (score := _score(state, "early")) is None else sign * score for state in states]
    final = [None if (score := _score(state, "final")) is None else sign * score for state in states]
    agreement = rank_agreement(early, final, top_k=top_k, failed=[state.failed for state in states])
    curves, importance = ([], {}) if posterior is None else partial_dependence(posterior, sign=sign)
    return {
        "objective": {"name": objectives.names[0], "direction": objectives.goal.direction},
        **_further(history, best, objectives),
        "fraction": shares.fraction,
        **_finish(history, shares, top_k),
        **repeats_summary(history, objectives.goal, seeds),
        "trials": [
            {
                "id": state.trial.id,
                "configuration": state.trial.configuration,
                "early_score": _score(state, "early"),
                "standard_error": None if state.early is None else state.early.standard_error,
                "final_score": _score(state, "final"),
                "status": state.status,
                **({"values": objectives.values(state, state.early)} if objectives.shown else {}),
            }
            for state in states
        ],
        "best": _entry(best),
        "baseline": {**_entry(baseline), "in_space": reference_in_space},
        "untuned": _tested(history.untuned),
        "test_difference": _difference(best, baseline),
        "rank_agreement": agreement,
        "budget": {
            "steps_run": sum(state.steps_run for state in states),
            "steps_if_all_finished": sum(state.total_steps or 0 for state in states),
            "compilations": sum(state.compilations for state in states),
            "seconds": recorded_work(history),
        },
        **_dropped(history),
        "ended": "trials" if history.enough is None else history.enough["reason"],
        "partial_dependence": curves,
        "importance": importance,
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Writes ``summary.json`` in one piece: a reader sees the old one or the new one."""
    path = RunFiles(run_dir).summary_path
    write_atomically(path, json.dumps(plain(summary), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return path
