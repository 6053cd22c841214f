"""``tpe``: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011, multivariate as in BOHB)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from jaxtune.search.candidates import design, random_point, random_state, taken_points
from jaxtune.search.methods.optuna_study import distributions, empty_study, require_optuna, told_trials
from jaxtune.search.methods.protocol import Method
from jaxtune.search.observation import Observation, Proposal
from jaxtune.search.rules import RULES
from jaxtune.search.space import Point, Space

# Draws of the estimator before a point that no trial has is taken at random: only small finite spaces need more.
_DRAWS = 10


class TreeParzen(Method):
    """Points where good trials are dense and bad ones are not; see :func:`make_method` for the arguments.

    It starts from the same space-filling design as ``gp``. Pending trials count as bad ones (Optuna's
    ``constant_liar``), and so do trials that were stopped, the earlier the worse.

    Raises:
      UserError: Optuna is not installed.
    """

    name = "tpe"

    def __init__(self, space: Space, *, seed: int, initial: int, acquisition: str = "ei", rules: int = RULES):
        del acquisition, rules  # the estimator has its own
        require_optuna(self.name)
        self._space, self._seed, self._initial = space, seed, initial

    def propose(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Proposal:
        """The point of the design, or the estimator's best draw."""
        taken = taken_points(told, pending)
        point, source = None, "random"
        if trial < self._initial:
            point, source = self._design[trial - 1], "design"
        elif any(observation.score is not None for observation in told):
            point, source = self._draw(trial, told, pending), "surrogate"
        if point is None or tuple(point) in taken:
            point = random_point(self._space, taken, seed=self._seed, trial=trial)
        return Proposal(self._space.configuration(point), source)

    @cached_property
    def _design(self) -> list[Point]:
        return design(self._space, seed=self._seed, count=self._initial - 1)

    def _draw(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Point | None:
        """A point of the estimator that no trial has, or None."""
        from optuna.samplers import TPESampler

        sampler = TPESampler(
            seed=random_state(self._seed, trial), multivariate=True, constant_liar=True, n_startup_trials=1
        )
        study = empty_study(sampler)
        study.add_trials(told_trials(self._space, told, pending))
        taken, fixed = taken_points(told, pending), distributions(self._space)
        for _ in range(_DRAWS):
            drawn = study.ask(fixed).params
            point = self._space.snap([drawn[key] for key in self._space.keys])
            if tuple(point) not in taken:
                return point
        return None
