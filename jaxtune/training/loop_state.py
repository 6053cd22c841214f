"""What the loop of a run knows of the steps behind it. Every checkpoint holds it, for the process that goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

Planned = tuple[int, int]
"""The step from which on a schedule counted, and the number of steps that it was made for."""


@dataclasses.dataclass
class LoopState:
    """The past of a run, whichever processes trained it.

    Attributes:
      best: the lowest validation loss of the evaluations that count for early stopping.
      misses: evaluations since then without improvement.
      metrics: training metrics of the last logged step.
      evaluation: the last evaluation, or empty.
      evaluated: the step of that; None before the first.
      steps: optimizer steps whose examples are counted: not those before a checkpoint of an earlier version.
      examples: seen in them; one cut over several rows counts in each.
      planned: how long the run was to be, and from which step on; more than one where it was taken further.
    """

    best: float = math.inf
    misses: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluated: int | None = None
    steps: int = 0
    examples: int = 0
    planned: Sequence[Planned] = ()

    @classmethod
    def read(cls, record: Mapping[str, Any], step: int) -> LoopState:
        """What :meth:`record` has written.

        Args:
          record: of a checkpoint; one of an earlier version has the evaluation of its own step at most.
          step: of the checkpoint.
        """
        evaluation = record["evaluation"]
        return cls(
            best=math.inf if record["best"] is None else record["best"],
            misses=record["misses"],
            metrics=record.get("metrics", {}),
            evaluation=evaluation,
            evaluated=record.get("evaluated", step if evaluation else None),
            steps=record.get("steps", 0),
            examples=record.get("examples", 0),
            planned=tuple((since, total) for since, total in record.get("planned", ())),
        )

    def record(self) -> dict[str, Any]:
        """Itself as JSON has it."""
        return {**dataclasses.asdict(self), "best": self.best if math.isfinite(self.best) else None}

    def improved(self, score: float) -> None:
        """Counts an evaluation for early stopping."""
        if score < self.best:
            self.best, self.misses = score, 0
        else:
            self.misses += 1

    def plan(self, step: int, total: int) -> int | None:
        """Notes how long the run is to be from a step on.

        Returns:
          How long it was to be, where that was something else.
        """
        before = self.planned[-1][1] if self.planned else None
        if before == total:
            return None
        self.planned = (*self.planned, (0 if before is None else step, total))
        if before is not None:
            # Whoever takes a run further that had run out of patience wants to see more of it.
            self.misses = 0
        return before

    @property
    def examples_per_step(self) -> float | None:
        """The mean; None before the first step."""
        return self.examples / self.steps if self.steps else None
