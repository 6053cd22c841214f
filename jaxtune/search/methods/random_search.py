"""``random``: points drawn from the space without looking at a score; the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtune.search.candidates import random_point, taken_points
from jaxtune.search.methods.protocol import Method
from jaxtune.search.observation import Observation, Proposal
from jaxtune.search.rules import RULES
from jaxtune.search.space import Point, Space


class RandomSearch(Method):
    """Independent draws (Bergstra & Bengio 2012), without repeats; see :func:`make_method` for the arguments."""

    def __init__(self, space: Space, *, seed: int, initial: int, acquisition: str = "ei", rules: int = RULES):
        del initial, acquisition, rules  # no design: every trial is a draw
        self._space, self._seed = space, seed

    def propose(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Proposal:
        """A new random point."""
        point = random_point(self._space, taken_points(told, pending), seed=self._seed, trial=trial)
        return Proposal(self._space.configuration(point), "random")
