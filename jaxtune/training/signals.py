"""Stopping when asked to: ``SIGTERM`` and ``SIGINT`` let the loop save and end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.signals import stops_handled


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first ``SIGTERM`` or Ctrl-C asks for a stop instead of killing; a second one kills.

    Yields:
      A function that tells whether a stop was asked for. With several processes it is a collective call: all of them
      get the same answer, so that they leave the loop at the same step.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, previous[signal.Signals(number)])

    def should_stop() -> bool:
        if jax.process_count() == 1:
            return asked
        return bool(np.any(multihost_utils.process_allgather(np.array([asked]))))

    with stops_handled(ask) as previous:
        yield should_stop
