"""Stopping when asked to: ``SIGTERM`` and ``SIGINT`` let the loop save and end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first ``SIGTERM`` or Ctrl-C asks for a stop instead of killing; a second one kills.

    Yields:
      A function that tells whether a stop was asked for. With several processes it is a collective call: all of them
      get the same answer, so that they leave the loop at the same step.
    """
    asked = False
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, previous[signal.Signals(number)] or signal.SIG_DFL)

    def should_stop() -> bool:
        if jax.process_count() == 1:
            return asked
        return bool(np.any(multihost_utils.process_allgather(np.array([asked]))))

    for number in previous:
        signal.signal(number, ask)
    try:
        yield should_stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
