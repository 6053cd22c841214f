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
      objectives: all objectives there, the first one's score first, lower is better; empty where there is one alone,
        None in it where one is not known.
      violation: how many bounds on measured metrics the trial violates, and by how much.
      bounds: the same of all bounds, those of counted costs too.
      stopped: how many rungs it had reached when it was stopped short of the study's fraction, the last of which its
        score is of: it compares with that of no trial that went further. None where it reached the fraction.
    """

    point: Point
    score: float | None
    standard_error: float | None = None
    stopped: int | None = None
    objectives: tuple[float | None, ...] = ()
    violation: tuple[int, float] = (0, 0.0)
    bounds: tuple[int, float] = (0, 0.0)


@dataclass(frozen=True)
class Proposal:
    """The next trial.

    Attributes:
      configuration: dotted keys to plain Python values.
      source: ``design`` (space-filling), ``surrogate`` (the method's own model), ``random``, or
        ``transfer`` (a trial of an earlier study).
      prior_dropped: the number of scores that made the method drop the priors of the space; None where they hold.
    """

    configuration: dict[str, Any]
    source: str
    prior_dropped: int | None = None


def finite_scores(observations: Sequence[Observation]) -> list[float]:
    """Scores without gaps: a diverged trial gets the worst one, or a worse one where that is the best as well.

    Raises:
      ValueError: all diverged.
    """
    finite = [observation.score for observation in observations if observation.score is not None]
    worst = max(finite)
    # How much worse does not matter, as what takes these scores scales them by their spread.
    diverged = worst if min(finite) < worst else worst + max(1.0, abs(worst))
    return [diverged if observation.score is None else observation.score for observation in observations]
