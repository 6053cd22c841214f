"""How fast a run trains: tokens and FLOPs per second, and the share of the devices' peak."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps between two logged ones.

    Attributes:
      steps: how many.
      tokens: theirs, padding left out.
    """

    steps: int
    tokens: int


class Throughput:
    """Counts steps and tokens, and the time they take; what happens while it is paused takes none.

    Steps run ahead of the host. So a window is closed (:meth:`close`) when its last step is launched and measured
    (:meth:`rates`) when that step's metrics have been read: then its work is done.

    Args:
      flops_per_step: model FLOPs of a step; padding is computed as well, so a step always takes as many.
      peak: FLOP/s of all devices of the run by their data sheets; None where it is not known.
      clock: seconds.
    """

    def __init__(self, flops_per_step: float, peak: float | None, clock: Callable[[], float] = time.perf_counter):
        self._flops, self._peak, self._clock = flops_per_step, peak, clock
        self._steps = self._tokens = 0
        self._seconds = 0.0
        self._since: float | None = None

    def resume(self) -> None:
        """Starts the clock."""
        self._since = self._clock()

    def pause(self) -> None:
        """Stops the clock until :meth:`resume`."""
        self._seconds += self._elapsed()
        self._since = None

    def count(self, tokens: int) -> None:
        """A step with so many tokens was launched."""
        self._steps += 1
        self._tokens += tokens

    def close(self) -> Window:
        """The steps counted since the last window."""
        window = Window(self._steps, self._tokens)
        self._steps = self._tokens = 0
        return window

    def rates(self, window: Window) -> dict[str, float]:
        """Its ``tokens_per_second`` (none without tokens), ``flops_per_second`` and, where the peak is known, ``mfu``.

        MFU is model FLOPs over the peak (arXiv:2204.02311, appendix B): what rematerialisation computes again does not
        count.
        """
        seconds = max(self._seconds + self._elapsed(), 1e-9)
        self._seconds = 0.0
        if self._since is not None:
            self._since = self._clock()
        flops = window.steps * self._flops / seconds
        rates = {"flops_per_second": flops}
        if window.tokens:
            rates = {"tokens_per_second": window.tokens / seconds, **rates}
        return rates if self._peak is None else {**rates, "mfu": flops / self._peak}

    def _elapsed(self) -> float:
        return 0.0 if self._since is None else self._clock() - self._since
