"""The first step of a run that is not finite, found whenever someone looks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

_MOST = 200
"""Steps whose metrics wait to be read, at most."""


class Divergence:
    """Knows the metrics of every step that was not read yet.

    Metrics are read when a step is logged, evaluated or saved, and when a checkpoint is due by time. So that it does
    not matter which of them comes first, each step in between is looked at as well, the oldest first.

    Attributes:
      first: the first step whose loss or gradient is not finite, with its metrics; None while there is none.
    """

    def __init__(self) -> None:
        self.first: tuple[int, Mapping[str, Any]] | None = None
        self._unread: list[tuple[int, Mapping[str, Any]]] = []

    def launched(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step was launched; its metrics stay where they are."""
        self._unread.append((step, metrics))
        if len(self._unread) > _MOST:
            # The older half is long done: the device is not waited for.
            self.read(step - _MOST // 2)

    def read(self, until: int) -> bool:
        """Waits for the steps up to one, and tells whether one of them diverged."""
        due = [entry for entry in self._unread if entry[0] <= until]
        self._unread = self._unread[len(due) :]
        named = [{name: metrics[name] for name in ("loss", "grad_norm") if name in metrics} for _, metrics in due]
        for entry, values in zip(due, jax.device_get(named), strict=True):
            # Whatever follows the first one follows from it.
            if self.first is None and not all(math.isfinite(value) for value in values.values()):
                self.first = entry
        return self.first is not None
