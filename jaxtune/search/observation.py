"""What a search method is told of a trial, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.search.space import Point


@dataclass(frozen=True)
class Observation:
    """A scored trial.

    Attributes:
      point: where.
      score: lower is better; None for a diverged trial, which counts as the worst finite score so far.
      standard_error: of the score, in its own units; None where unknown.
      stopped: the step at which it was stopped short of the study's fraction; None where it reached the fraction. Its
        score is that of the earlier step.
    """

    point: Point
    score: float | None
    standard_error: float | None = None
    stopped: int | None = None


@dataclass(frozen=True)
class Proposal:
    """The next trial.

    Attributes:
      configuration: dotted keys to plain Python values.
      source: ``design`` (space-filling), ``surrogate`` (the method's own model), or ``random``.
    """

    configuration: dict[str, Any]
    source: str


def finite_scores(observations: Sequence[Observation]) -> list[float]:
    """Scores without gaps: a diverged trial gets the worst one.

    Raises:
      ValueError: all diverged.
    """
    worst = max(observation.score for observation in observations if observation.score is not None)
    return [worst if observation.score is None else observation.score for observation in observations]
