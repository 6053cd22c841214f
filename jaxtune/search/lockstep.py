"""The order in which trials that train side by side are scored, whether or not the study was killed on the way.

What a proposal knows follows from that order. Where trials take a step each at a time, it is the order of the steps at
which they end, counted from the study's beginning: the journal tells it. After a kill trials go on from checkpoints of
different steps and would end in another: so those that are ahead are held until the ones are scored that come before
them. In a study that goes through nothing is ever held.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtune.search.outcome import Outcome
from jaxtune.search.runner import TrialRunner
from jaxtune.search.trial import History, Trial

Scored = tuple[Trial, Outcome]


class Lockstep:
    """Hands on the scores of a runner in the order of an uninterrupted study, while trials are proposed.

    That a trial will diverge before another one ends cannot be foreseen: after a kill it is told of when it does.

    Args:
      runner: trains the trials; nothing is held unless it says that it trains in ``lockstep``.
      history: of the study.
      targets: the step that each trial under way is trained to, by number; kept up to date by whoever starts them.
    """

    def __init__(self, runner: TrialRunner, history: History, targets: Mapping[int, int]):
        self._runner, self._history, self._targets = runner, history, targets
        self._in_order = bool(getattr(runner, "lockstep", False))
        self._begun: dict[int, int] = {}
        self._held: list[Scored] = []
        self._waited = False

    def start(self, number: int) -> None:
        """Notes that a trial starts, or goes on: what starts first thing was under way when the study was killed."""
        self._begun.setdefault(number, self._history.clock if self._waited else self._history.begun[number])

    @property
    def behind(self) -> bool:
        """Whether a trial is under way that would have been scored by now, so that no proposal may be made yet."""
        return self._in_order and any(self._ends(number) <= self._history.clock for number in self._late())

    def wait(self) -> list[Scored]:
        """Trials that are scored, those that end at one step together; see :meth:`TrialRunner.wait`."""
        self._waited = True
        if not self._in_order:
            return self._runner.wait()
        while not (due := self._due()):
            self._held += self._runner.wait()
        self._held = [one for one in self._held if one not in due]
        return due

    def _due(self) -> list[Scored]:
        """The first of those that are held, if none that still trains is to come before them."""
        first = min((self._ended(one) for one in self._held), default=0)
        if any(self._ends(number) <= first for number in self._late()):
            return []
        due = [one for one in self._held if self._ended(one) == first]
        return sorted(due, key=lambda one: self._history.legs[one[0].id])

    def _late(self) -> list[int]:
        """Trials that still train."""
        scored = {trial.id for trial, _ in self._held}
        return [number for number in self._targets if number not in scored]

    def _ends(self, number: int) -> int:
        return self._begun[number] + self._targets[number]

    def _ended(self, one: Scored) -> int:
        return self._begun[one[0].id] + one[1].steps_run
