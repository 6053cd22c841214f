"""The order in which trials that train side by side are scored, whether or not the study was killed on the way.

What a proposal knows follows from that order. Where trials take a step each at a time, it is in an uninterrupted study
the order of the steps at which they end, counted from the study's beginning. After a kill they go on from checkpoints
of different steps and would end in another: so those that are ahead are held until the ones are scored that would have
been scored before them.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtune.search.outcome import Outcome
from jaxtune.search.runner import TrialRunner
from jaxtune.search.trial import History, Trial

Scored = tuple[Trial, Outcome]


class Lockstep:
    """Hands on the scores of a runner in the order of an uninterrupted study.

    Only what an earlier process began is waited for. That one of these will diverge before another one ends cannot be
    foreseen: it is told of when it does.

    Args:
      runner: trains the trials; one that says it trains in ``lockstep``, or else nothing is held.
      history: of the study.
      targets: the step that each trial under way is trained to, by number; kept up to date by whoever starts them.
    """

    def __init__(self, runner: TrialRunner, history: History, targets: Mapping[int, int]):
        self._runner, self._history, self._targets = runner, history, targets
        self._resumed: set[int] = set()
        self._held: list[Scored] = []

    def resume(self, number: int) -> None:
        """Notes that a trial goes on that an earlier process began."""
        if getattr(self._runner, "lockstep", False):
            self._resumed.add(number)

    @property
    def behind(self) -> bool:
        """Whether a trial is under way that would have been scored by now, so that no proposal may be made yet."""
        return any(self._ends(number) <= self._history.clock for number in self._late())

    def wait(self) -> list[Scored]:
        """Trials that are scored, those that end at one step together; see :meth:`TrialRunner.wait`."""
        while not (due := self._due()):
            self._held += self._runner.wait()
        self._held = [one for one in self._held if one not in due]
        self._resumed -= {trial.id for trial, _ in due}
        return due

    def _due(self) -> list[Scored]:
        """The first of those that are held, if none that still trains is to come before them."""
        if not self._resumed:
            return self._held
        first = min((self._ended(one) for one in self._held), default=0)
        if any(self._ends(number) <= first for number in self._late()):
            return []
        due = [one for one in self._held if self._ended(one) == first]
        return sorted(due, key=lambda one: self._history.legs[one[0].id])

    def _late(self) -> list[int]:
        """Resumed trials that still train."""
        scored = {trial.id for trial, _ in self._held}
        return [number for number in self._resumed if number in self._targets and number not in scored]

    def _ends(self, number: int) -> int:
        return self._history.begun[number] + self._targets[number]

    def _ended(self, one: Scored) -> int:
        return self._history.begun[one[0].id] + one[1].steps_run
