"""What ``SIGTERM`` and Ctrl-C do within a block."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int
"""A function, ``SIG_IGN`` or ``SIG_DFL``."""
STOPS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stops_handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[Mapping[signal.Signals, Handler]]:
    """Calls ``handler`` for ``SIGTERM`` and ``SIGINT`` within the block; afterwards they do what they did before.

    Yields:
      What each signal did before.
    """
    # None: set by code that is not Python's, which cannot be put back.
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPS}
    for number in STOPS:
        signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
