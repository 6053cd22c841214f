"""What a study asks of a search method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtune.search.observation import Observation, Proposal
from jaxtune.search.space import Point


@runtime_checkable
class Method(Protocol):
    """Proposes trials, and may stop some of them before the study's fraction.

    Nothing is kept between two calls: every answer follows from the study's seed, the trial's number and the arguments
    alone, so that a study that was killed repeats it. What a trial's score at the fraction leads to (promotion, report)
    is the study's own and the same for all methods.
    """

    def propose(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Proposal:
        """The configuration of trial ``trial`` (1 or above), new to ``told`` and ``pending``.

        Args:
          trial: its number, which picks the random stream and, early on, the point of the design.
          told: scored, stopped and diverged trials, in the order of their numbers.
          pending: points of trials that have no score yet.

        Raises:
          ValueError: every configuration of a finite space has been tried.
        """
        ...

    def rungs(self, until: int) -> tuple[int, ...]:
        """Steps before ``until``, ascending, at which :meth:`stops` is to be asked; none unless the method prunes."""
        return ()

    def stops(self, trial: int, until: int, reports: Mapping[int, Mapping[int, float]]) -> bool:
        """Whether ``trial`` ends at the rung it has just been scored at.

        Args:
          trial: its number.
          until: the step at the study's fraction, as for :meth:`rungs`.
          reports: of each trial that reached a rung, this one included: its score at each rung so far. Lower is
            better; NaN where it diverged.
        """
        return False
