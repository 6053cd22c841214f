"""Where a study's time goes: what its main thread does, looked at a hundred times a second.

Nothing of the study is changed or waited for: a second thread reads which functions the main one is in, and the
innermost that is known says what the moment belongs to.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import FrameType

PARTS = ("start-up", "compiling", "steps", "evaluation", "proposals", "other")
"""``start-up`` is all but compiling before the first step: imports, the model, the data. ``compiling`` is tracing and
lowering too. ``steps`` are training steps with what runs between them. ``proposals`` is what a free place waits for."""

_INTERVAL = 0.01
# Parts of file names, innermost frame first; of the peer's own file also the function.
_FILES: Sequence[tuple[str, str]] = (
    ("jax/_src/compiler.py", "compiling"),
    ("jax/_src/interpreters/mlir.py", "compiling"),
    ("jax/_src/interpreters/pxla.py:lower", "compiling"),
    ("jax/_src/pjit.py:_infer_params", "compiling"),
    ("jax/_src/stages.py:lower", "compiling"),
    ("jaxtune/evaluation/", "evaluation"),
    ("jaxtune/search/proposals.py", "proposals"),
    ("jaxtune/training/population.py:step", "steps"),
    ("jaxtune/training/trainer.py:step", "steps"),
    ("jaxtune/training/run.py", "steps"),
    ("optuna/", "proposals"),
    ("makespan_peer.py:loss", "evaluation"),
    ("makespan_peer.py:_steps", "steps"),
)


def part_of(frame: FrameType | None) -> str:
    """What the innermost known function belongs to."""
    while frame is not None:
        place = f"{frame.f_code.co_filename.replace(chr(92), '/')}:{frame.f_code.co_name}"
        for known, part in _FILES:
            if known in place:
                return part
        frame = frame.f_back
    return "other"


class Parts:
    """Counts from its making to :meth:`stop`.

    Args:
      started: when the process was, in seconds of :func:`time.time`: what went by before is start-up.
    """

    def __init__(self, started: float):
        self._started, self._seconds, self._begun = started, Counter[str](), False
        self._main, self._stopped = threading.get_ident(), threading.Event()
        self._seconds["start-up"] = time.time() - started
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Seconds of each of :data:`PARTS`, which sum to the time since ``started``."""
        self._stopped.set()
        self._thread.join()
        return {part: self._seconds[part] for part in PARTS}

    def _watch(self) -> None:
        before = time.perf_counter()
        while not self._stopped.wait(_INTERVAL):
            part = part_of(sys._current_frames().get(self._main))
            now = time.perf_counter()
            self._begun = self._begun or part == "steps"
            self._seconds[part if self._begun or part == "compiling" else "start-up"] += now - before
            before = now
        self._seconds["other"] += time.perf_counter() - before


def step_seconds(parts: Mapping[str, float], steps: int) -> float | None:
    """The mean of a training step; None where none was run."""
    return parts["steps"] / steps if steps else None
