"""What a study asks of whatever trains its trials."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.trial import Trial


class Interrupted(Exception):
    """Raised by a runner that was told to stop in the middle of a trial; the study ends there and can be continued."""


@runtime_checkable
class TrialRunner(Protocol):
    """Trains and scores trials, several at a time. A study calls it from one thread.

    One whose trials take a step each at a time, so that those that end at the same step are scored together, says so by
    an attribute ``lockstep`` that is true.
    """

    @property
    def capacity(self) -> int:
        """How many trials train at the same time."""
        ...

    def total_steps(self, trial: Trial) -> int:
        """The trial's full length in optimizer steps, which its schedule is planned for."""
        ...

    def program(self, trial: Trial) -> str:
        """Names the compiled step that trains the trial: the same in every process, for all trials that share it."""
        ...

    def start(self, trial: Trial, until: int) -> None:
        """Begins to train a trial from its own last checkpoint (or its start) to step ``until``; :meth:`wait` ends it.

        At most :attr:`capacity` trials train at a time. Started again for the same step after a crash, a trial ends
        with the same score.

        Raises:
          Interrupted: it was told to stop.
        """
        ...

    def wait(self) -> list[tuple[Trial, Outcome]]:
        """Trains until at least one of the trials that were started is scored, and returns those that are.

        A trial that diverges is an outcome, not an exception.

        Raises:
          Interrupted: it was told to stop before that; what was trained is saved.
        """
        ...

    def test(self, trial: Trial | None) -> TestOutcome | None:
        """Measures a finished trial, or the untuned base model (None), on the test split; None without a test split."""
        ...

    def close(self) -> None:
        """Gives up trials that were started and not scored; what they have saved stays."""
        ...


@runtime_checkable
class CountsFlops(Protocol):
    """A runner that knows what a step of a trial computes, for a budget in FLOPs."""

    def step_flops(self, trial: Trial) -> float:
        """Model FLOPs of one step of the trial, over full rows."""
        ...


def run_all(runner: TrialRunner, jobs: Iterable[tuple[Trial, int]]) -> Iterator[tuple[Trial, Outcome]]:
    """Trains every trial to its step, as many at a time as the runner holds, and yields them as they are scored.

    Args:
      runner: with nothing started.
      jobs: trials, each with the step that it is trained to; taken one by one as places become free.

    Raises:
      Interrupted: the runner was told to stop.
    """
    waiting, running = iter(jobs), 0
    while True:
        while running < runner.capacity and (job := next(waiting, None)) is not None:
            runner.start(*job)
            running += 1
        if not running:
            return
        for scored in runner.wait():
            running -= 1
            yield scored
