"""Who is told of training while it goes on, and who may stop it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Listener(Protocol):
    """Is told what the loop does: a progress display."""

    def on_start(self, step: int, total: int) -> None:
        """The loop starts at ``step`` and ends at ``total``."""
        ...

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step were logged."""
        ...

    def on_end(self) -> None:
        """The loop is over."""
        ...


ShouldStop = Callable[[], bool]
"""Asked after every step: whether to save and return."""

OnPlan = Callable[[Sequence[Mapping[str, Any]]], None]
"""Is told what is trained, rows of a table, before the first step."""

Event = Callable[[str, int | None, Mapping[str, Any]], None]
"""Is told what happens to the trials of a study: event, trial, record."""


def never() -> bool:
    """Nobody stops it."""
    return False


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Who is told of the trials of a study or an experiment, and who may stop it.

    Attributes:
      listener: makes the progress display of a trial, given its title.
      on_event: is told every journal record, and ``started`` before a trial trains.
      should_stop: asked after every step and between trials.
      accept_changed_data: go on where the training or the validation split is not what it was; otherwise refused.
    """

    listener: Callable[[str], Listener | None] | None = None
    on_event: Event | None = None
    should_stop: ShouldStop = never
    accept_changed_data: bool = False

    def listen(self, title: str) -> Listener | None:
        """The progress display of a trial; None where nobody looks."""
        return None if self.listener is None else self.listener(title)

    def titled(self, prefix: str) -> Hooks:
        """The same, with displays whose titles begin with something."""
        listener = self.listener
        if listener is None:
            return self
        return dataclasses.replace(self, listener=lambda title: listener(f"{prefix}, {title}"))


NOBODY = Hooks()
"""Nobody is told, and nobody stops it."""
