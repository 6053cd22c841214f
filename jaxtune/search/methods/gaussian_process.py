"""``gp``: the study's own Gaussian process proposes (``search.acquisition``)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtune.search.methods.protocol import Method
from jaxtune.search.observation import Observation, Proposal
from jaxtune.search.rules import RULES
from jaxtune.search.space import Point, Space
from jaxtune.search.surrogate import Surrogate


class GaussianProcess(Method):
    """Proposals of :class:`jaxtune.search.surrogate.Surrogate`; see :func:`make_method` for the arguments."""

    def __init__(self, space: Space, *, seed: int, initial: int, acquisition: str = "ei", rules: int = RULES):
        self._surrogate = Surrogate(space, seed=seed, initial=initial, acquisition=acquisition, rules=rules)

    def propose(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Proposal:
        """The point of the design, or the candidate that the acquisition values most."""
        return self._surrogate.propose(trial, told, pending)
