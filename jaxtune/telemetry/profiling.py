"""Measuring steps, and recording them with jax's profiler."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Wall-clock seconds of single steps, each waited for.

    Attributes:
      seconds: of every measured step, in order.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one: what a step usually takes."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """The fastest one: least disturbed by whatever else the machine does."""
        return min(self.seconds)


def time_steps(step: Callable[[], object], *, steps: int, warmup: int = 2) -> StepTimes:
    """Times ``step``, which returns arrays that depend on its work.

    Args:
      step: does one step.
      steps: how many are measured.
      warmup: how many come before, among them the one that compiles.
    """
    for _ in range(warmup):
        jax.block_until_ready(step())
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - begin)
    return StepTimes(seconds)


def record_trace(step: Callable[[], object], directory: str | Path, *, steps: int = 3) -> Path:
    """Records steps into ``directory`` for TensorBoard's profile plugin, XProf or Perfetto."""
    with jax.profiler.trace(str(directory)):
        for number in range(steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                jax.block_until_ready(step())
    return Path(directory)
