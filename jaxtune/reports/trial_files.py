"""What a trial's own files tell, which are written while it trains: its curves, and whether it is training now."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from jaxtune.config.metrics import VALIDATION_LOSS
from jaxtune.layout import TrialDirectory
from jaxtune.reports.formatting import finite
from jaxtune.search.durations import file_times
from jaxtune.telemetry.writers import read_metrics

CURVE_POINTS = 160
"""More than a drawing's width can tell apart."""

Curve = list[tuple[int, float | None]]


@dataclasses.dataclass(frozen=True)
class TrialFiles:
    """The files of one trial.

    Attributes:
      training: (step, training loss) pairs; None where the loss was not finite.
      validation: (step, validation loss) pairs.
      step: the last step that was logged, 0 if none was.
      written: when something was last written, in seconds since the epoch; None before anything was.
    """

    training: Curve
    validation: Curve
    step: int
    written: float | None


def read_trial_files(directory: Path) -> TrialFiles:
    """Reads a trial's directory, which another process may be writing to, and which need not be there yet."""
    metrics = TrialDirectory(directory).metrics_path
    logged = _modified(metrics)
    try:
        # Most files do not change between two looks at a running study.
        training, validation, step = _curves(metrics, *logged) if logged else ([], [], 0)
    except FileNotFoundError:  # moved aside since it was looked for
        training, validation, step = [], [], 0
    return TrialFiles(
        training=training,
        validation=validation,
        step=step,
        written=file_times(directory)[1],
    )


def _modified(file: Path) -> tuple[int, int] | None:
    """Time of the last change in nanoseconds, and the size; None if there is no such file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4096)
def _curves(file: Path, modified: int, size: int) -> tuple[Curve, Curve, int]:
    records = [record for record in read_metrics(file) if isinstance(record, dict) and "step" in record]
    curves = [
        [(int(record["step"]), finite(record[name])) for record in records if name in record]
        for name in ("loss", VALIDATION_LOSS)
    ]
    return _thinned(curves[0]), _thinned(curves[1]), int(records[-1]["step"]) if records else 0


def _thinned(points: Curve) -> Curve:
    """At most ``CURVE_POINTS`` points and the last one."""
    if len(points) <= CURVE_POINTS:
        return points
    stride = len(points) / CURVE_POINTS
    return [*(points[int(index * stride)] for index in range(CURVE_POINTS)), points[-1]]
