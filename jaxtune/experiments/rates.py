"""The rates that a method is tried with: half decades around a middle, and further ones where the best is an end."""

from __future__ import annotations

import math
from collections.abc import Mapping

HALF_DECADE = math.sqrt(10)


def first_rates(middle: float, count: int) -> list[float]:
    """So many rates around a middle, ascending, half a decade apart; of an even number one more lies below it."""
    return [rounded(middle * HALF_DECADE ** (place - count // 2)) for place in range(count)]


def best_rate(scores: Mapping[float, float]) -> float | None:
    """The rate of the lowest score, of equal ones the lower rate; None where all have diverged.

    Args:
      scores: by rate, lower is better; infinite where a run has diverged.
    """
    rate = min(sorted(scores), key=lambda rate: scores[rate])
    return rate if math.isfinite(scores[rate]) else None


def on_end(scores: Mapping[float, float]) -> bool:
    """Whether the best rate is the lowest or the highest that was tried: a better one may lie beyond it."""
    return best_rate(scores) in (None, min(scores), max(scores))


def next_rate(scores: Mapping[float, float]) -> float | None:
    """Half a decade beyond the end that is best, below all where all have diverged; None where the best is inside.

    Args:
      scores: by rate, of two rates at least, half a decade apart.
    """
    if not on_end(scores):
        return None
    tried = sorted(scores)
    # A decade from the second one: half decades from the last would be those of rounded numbers.
    return rounded(tried[-2] * 10 if best_rate(scores) == tried[-1] else tried[1] / 10)


def rounded(rate: float) -> float:
    """To three digits, as it stands in tables and commands."""
    return float(f"{rate:.3g}")
