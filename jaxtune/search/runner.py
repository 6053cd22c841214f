"""What a study asks of whatever trains its trials."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.trial import Trial


class Interrupted(Exception):
    """Raised by a runner that was told to stop in the middle of a trial; the study ends there and can be continued."""


@runtime_checkable
class TrialRunner(Protocol):
    """Trains and scores trials. A study calls it from one thread, one trial at a time."""

    @property
    def compilations(self) -> int:
        """How often the train step was compiled in this process so far."""
        ...

    def total_steps(self, trial: Trial) -> int:
        """The trial's full length in optimizer steps, which its schedule is planned for."""
        ...

    def run(self, trial: Trial, until: int) -> Outcome:
        """Continues a trial from its own last checkpoint (or its start) to step ``until`` and scores it.

        Called again for the same step after a crash, it ends with the same score. A trial that diverges is an outcome,
        not an exception.

        Raises:
          Interrupted: it was told to stop before ``until``.
        """
        ...

    def test(self, trial: Trial | None) -> TestOutcome | None:
        """Measures a finished trial, or the untuned base model (None), on the test split; None without a test split."""
        ...
