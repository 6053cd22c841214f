"""What the benchmarks share: how things are timed, and what is said of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtune.telemetry.environment import machine

__all__ = ["Launch", "Wait", "interleaved", "machine"]

Launch = Callable[[], Any]
Wait = Callable[[Any], None]


def interleaved(
    runs: dict[str, tuple[Launch, Wait]], samples: int, warmup: int, sample_seconds: float = 0.0
) -> dict[str, dict[str, float]]:
    """Times several things in turn, so that whatever else the machine does disturbs all alike.

    Args:
      runs: for each name, what starts one run, and what waits for what that returned.
      samples: how many times each is measured.
      warmup: runs that do not count, compiling among them.
      sample_seconds: a sample is as many runs back to back, waited for once, as take at least this long, so that the
        time of starting one hides behind another; zero for one.

    Returns:
      For each name the seconds of a run: median, 10th and 90th percentile, minimum; and the number of runs in a sample.
    """
    counts: dict[str, int] = {}
    for name, (launch, wait) in runs.items():
        for _ in range(warmup):
            wait(launch())
        begin = time.perf_counter()
        wait(launch())
        counts[name] = max(1, int(np.ceil(sample_seconds / (time.perf_counter() - begin))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, (launch, wait) in runs.items():
            begin = time.perf_counter()
            last = None
            for _ in range(counts[name]):
                last = launch()
            wait(last)
            seconds[name].append((time.perf_counter() - begin) / counts[name])
    return {
        name: {
            "seconds_median": statistics.median(values),
            "seconds_p10": float(np.percentile(values, 10)),
            "seconds_p90": float(np.percentile(values, 90)),
            "seconds_minimum": min(values),
            "runs_per_sample": counts[name],
        }
        for name, values in seconds.items()
    }
