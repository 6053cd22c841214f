"""Optuna as its users run it, over recorded curves: its default TPE with a pruner, trials trained one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optuna
from replay import Pool, Strategy, Table, Winners, winners

from jaxtune.search.methods.optuna_study import distributions


class NearestRecorded(optuna.samplers.BaseSampler):
    """Another sampler's proposals, each replaced by the nearest recorded configuration that is free."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, table: Table):
        self._sampler, self._table, self.pool = sampler, table, Pool(table)
        self._distributions = distributions(table.space)
        self.taken: dict[int, int] = {}

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """All dimensions: they are replaced together."""
        return self._distributions

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        """The other sampler's joint proposal, or its single ones while it has none."""
        space = self._sampler.infer_relative_search_space(study, trial)
        drawn = self._sampler.sample_relative(study, trial, space)
        for name, distribution in search_space.items():
            if name not in drawn:
                drawn[name] = self._sampler.sample_independent(study, trial, name, distribution)
        keys = self._table.space.keys
        index = self.pool.take([drawn[key] for key in keys])
        self.taken[trial.number] = index
        return dict(zip(keys, self._table.points[index], strict=True))

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        """Never asked: all dimensions are sampled together."""
        raise AssertionError(param_name)

    def before_trial(self, study: Any, trial: Any) -> None:
        """Passed on."""
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        """Passed on."""
        self._sampler.after_trial(study, trial, state, values)


def tpe_with(pruner: str) -> Strategy:
    """TPE with a pruner over all recorded steps: ``none``, ``median`` or ``hyperband``, with Optuna's defaults.

    Hyperband is told what its defaults would take from the first trial: the shortest and the full length.
    """

    def run(table: Table, seed: int, budgets: Sequence[float]) -> Winners:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruners = {
            "none": optuna.pruners.NopPruner(),
            "median": optuna.pruners.MedianPruner(),
            "hyperband": optuna.pruners.HyperbandPruner(min_resource=table.steps[0], max_resource=table.steps[-1]),
        }
        sampler = NearestRecorded(optuna.samplers.TPESampler(seed=seed), table)
        # The name draws the brackets of Hyperband.
        study = optuna.create_study(study_name=f"replay-{seed}", sampler=sampler, pruner=pruners[pruner])
        spent = 0.0
        ends: list[tuple[float, int]] = []

        def objective(trial: optuna.Trial) -> float:
            nonlocal spent
            for name, distribution in distributions(table.space).items():
                trial._suggest(name, distribution)
            index = sampler.taken[trial.number]
            begin, loss = spent, math.nan
            for column, step in enumerate(table.steps):
                loss = float(table.losses[index, column])
                spent = begin + table.share(column)
                trial.report(loss, step)
                if trial.should_prune():
                    raise optuna.TrialPruned
                if not math.isfinite(loss):
                    return loss
            ends.append((spent, index))
            return loss

        while spent < max(budgets) and len(sampler.pool):
            study.optimize(objective, n_trials=1)
        return winners(table, ends, budgets)

    return run
