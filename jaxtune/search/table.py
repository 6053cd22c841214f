"""The trials of a study as flat rows, for pandas or a CSV file."""

from __future__ import annotations

import os
from typing import Any

from jaxtune.search.status import read_recorded, score_of
from jaxtune.search.trial import TrialState


def trials(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The trials of a study, running or over, one flat mapping each: ``pandas.DataFrame(jaxtune.trials(run_dir))``.

    All rows have the same keys: ``trial``, ``status``, ``source``, the configuration by its dotted keys,
    ``early_score``, ``early_standard_error``, ``final_score``, ``final_standard_error``, ``test_score``, ``steps``,
    ``total_steps``, ``seconds``, the scores at rungs on the way as ``rung.STEP``, every metric as ``early.…``,
    ``final.…`` and ``test.…``, and counted costs that the study names as ``costs.…``. What is not known is None.

    Args:
      run_dir: the study's run directory.

    Raises:
      UserError: there is no study, or its journal is damaged.
    """
    recorded = read_recorded(run_dir)
    sources = recorded.sources
    states = [state for _, state in sorted(recorded.history.trials.items())]
    configurations = [recorded.configuration(state) for state in states]
    measured = [_metrics(state) for state in states]
    # The same columns in every row, whichever trial has something to put there.
    keys = dict.fromkeys(key for configuration in configurations for key in configuration)
    metrics = sorted({name for values in measured for name in values})
    rungs = [{outcome.steps_run: score_of(outcome) for outcome in state.between} for state in states]
    steps = sorted({step for scores in rungs for step in scores})
    return [
        {
            "trial": state.trial.id,
            "status": state.status,
            "source": sources.get(state.trial.id),
            **{key: configuration.get(key) for key in keys},
            **_outcomes(state),
            **{f"rung.{step}": scores.get(step) for step in steps},
            **{name: values.get(name) for name in metrics},
        }
        for state, configuration, scores, values in zip(states, configurations, rungs, measured, strict=True)
    ]


def _outcomes(state: TrialState) -> dict[str, Any]:
    early, final, test = state.early, state.final, state.test
    return {
        "early_score": score_of(early),
        "early_standard_error": None if early is None else early.standard_error,
        "final_score": score_of(final),
        "final_standard_error": None if final is None else final.standard_error,
        "test_score": None if test is None else test.score,
        "steps": max((outcome.steps_run for outcome in state.outcomes), default=0),
        "total_steps": state.total_steps,
        "seconds": float(sum(outcome.seconds for outcome in state.outcomes)),
    }


def _metrics(state: TrialState) -> dict[str, float]:
    outcomes = {"early": state.early, "final": state.final, "test": state.test}
    costs = {f"costs.{name}": value for name, value in state.costs.items()}
    return costs | {
        f"{which}.{name}": value
        for which, outcome in outcomes.items()
        if outcome is not None
        for name, value in outcome.metrics.items()
    }
