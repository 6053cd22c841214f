"""What training a trial, or testing a model, came to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """A trial scored on the validation set.

    Attributes:
      score: the objective, in its own direction; NaN or infinite where training diverged.
      standard_error: of the score over validation examples, in its own units; None where unknown.
      steps_run: optimizer steps of this trial since its start; fewer than asked for where it stopped early or diverged.
      seconds: what this call took.
      metrics: everything that was measured at this step.
      diverged: whether the loss or the score became NaN or infinite.
    """

    score: float
    standard_error: float | None
    steps_run: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    diverged: bool = False

    @property
    def failed(self) -> bool:
        """Whether the outcome is no score at all."""
        return self.diverged or not math.isfinite(self.score)


@dataclass(frozen=True)
class TestOutcome:
    """A model measured on the test split.

    Attributes:
      score: the objective on the test split.
      metrics: everything that was measured.
      per_example: the objective of each test example, in an order that is the same for all models; None where unknown.
      weights: each example's weight in the score (target tokens, for a loss; 0 where it does not count); None where all
        weigh the same.
      strata: each example's group where the score is the mean over groups (attributes); None for one group.
      clusters: each example's document where several come from one; None where all are independent.
      seconds: what this call took.
    """

    __test__ = False  # not a test case, whatever its name says to pytest

    score: float
    metrics: dict[str, float] = field(default_factory=dict)
    per_example: list[float] | None = None
    weights: list[float] | None = None
    strata: list[str] | list[int] | None = None
    clusters: list[str] | list[int] | None = None
    seconds: float = 0.0
