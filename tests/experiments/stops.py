"""A stop in the middle of an experiment, as a signal would ask for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from jaxtune.search import Interrupted, Trial


def stop_after(monkeypatch: pytest.MonkeyPatch, questions: int) -> None:
    """Asks for a stop once a command has asked so many times whether there is one."""
    asked = itertools.count()

    class Stops:
        def __enter__(self):
            return lambda: next(asked) >= questions

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("jaxtune.training.signals.stop_signals", Stops)


def interrupt_in_turn(*places: tuple[int, int]) -> Callable[[Trial, int], None]:
    """A runner's ``before`` hook that interrupts the first of these trials at its step, then the second, …"""
    left = list(places)

    def before(trial: Trial, step: int) -> None:
        if left and (trial.id, step) == left[0]:
            del left[0]
            raise Interrupted

    return before
