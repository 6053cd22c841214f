"""Any search method for several objectives, and within bounds of counted costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtune.search.allowance import Allowance
from jaxtune.search.candidates import taken_points
from jaxtune.search.methods.protocol import Method
from jaxtune.search.observation import Observation, Proposal
from jaxtune.search.scalarisation import scalarised
from jaxtune.search.space import Point


class Several(Method):
    """Tells a method one score of several objectives, and moves what it proposes to where the bounds allow it.

    Args:
      method: proposes for one score.
      allowance: of the space.
      seed: of the study.
    """

    def __init__(self, method: Method, allowance: Allowance, *, seed: int):
        self._method, self._allowance, self._seed = method, allowance, seed

    def propose(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Proposal:
        """The method's proposal for the weights of this trial, or one like it that is allowed."""
        proposal = self._method.propose(trial, scalarised(told, seed=self._seed, trial=trial), pending)
        space = self._allowance.space
        point = space.point(proposal.configuration)
        assert point is not None, "a method proposes points of the space"
        taken = taken_points(told, pending)
        spread = proposal.source != "surrogate"
        allowed = self._allowance.fitted(point, taken, seed=self._seed, trial=trial, spread=spread)
        return proposal if allowed == point else Proposal(space.configuration(allowed), proposal.source)

    def rungs(self, until: int) -> tuple[int, ...]:
        """Those of the method."""
        return self._method.rungs(until)

    def stops(self, trial: int, until: int, reports: Mapping[int, Mapping[int, float]]) -> bool:
        """As the method says, by the first objective."""
        return self._method.stops(trial, until, reports)
