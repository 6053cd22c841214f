"""``sobol``: a sequence that fills the space evenly without looking at a score; the steadier of the two baselines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtune.search.candidates import random_point, random_state, taken_points
from jaxtune.search.methods.protocol import Method
from jaxtune.search.observation import Observation, Proposal
from jaxtune.search.prior import Prior
from jaxtune.search.rules import RULES
from jaxtune.search.space import Point, Space


class Sobol(Method):
    """A scrambled Sobol sequence (Sobol 1967, Owen 1998), one point a trial; see :func:`make_method` for the arguments.

    Any first part of the sequence is spread evenly, over each key and over all of them together. A point that some
    trial has, as in a finite space, is replaced by a random one. Where keys have priors, the first trials, as many as
    other methods have in their design, fill the belief evenly, from the prior itself on, and later ones the space.
    """

    def __init__(self, space: Space, *, seed: int, initial: int, acquisition: str = "ei", rules: int = RULES):
        del acquisition, rules  # the whole sequence is a design, and nothing is learnt from scores
        self._space, self._seed, self._initial, self._prior = space, seed, initial, Prior.of(space)

    def propose(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Proposal:
        """The point of the sequence that belongs to the trial."""
        taken = taken_points(told, pending)
        point, source = self._point(trial - 1), "design"
        if tuple(point) in taken:
            point, source = random_point(self._space, taken, seed=self._seed, trial=trial), "random"
        return Proposal(self._space.configuration(point), source)

    def _point(self, index: int) -> Point:
        from scipy.stats import qmc

        generator = np.random.default_rng(random_state(self._seed, 0))
        # Called rng since SciPy 1.15, which still takes the older name.
        sequence = qmc.Sobol(len(self._space.dimensions), seed=generator)  # pyright: ignore[reportCallIssue]
        if index:
            sequence.fast_forward(index)
        unit = sequence.random(1)
        if self._prior is None or index + 1 >= self._initial:
            return self._space.at(unit[0])
        return (self._prior.points(unit) if index else self._prior.design(unit))[0]
