"""What ``SIGTERM`` and Ctrl-C do within a block."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stops_handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[dict[signal.Signals, object]]:
    """Calls ``handler`` for ``SIGTERM`` and ``SIGINT`` within the block; afterwards they do what they did before.

    Yields:
      What each signal did before: a function, ``SIG_IGN`` or ``SIG_DFL``.
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
