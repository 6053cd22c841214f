"""How many trials go on to each rung after the fraction, at the price of finishing the best ones straight away."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def promotions(promote: int, fraction: float, finish: Sequence[float]) -> tuple[int, ...]:
    """How many trials are trained on to each share of ``finish``, each half as many as the one before.

    The steps are those of ``promote`` trials that go straight from ``fraction`` to the end, as nearly as whole trials
    allow: ``n = round(p (1 - f) / sum_i 2^(k - 1 - i) (r_i - r_(i - 1)))`` are finished, where ``r_(-1) = f``. Five
    trials after 0.2 cost as much as eight that go on to 0.4 of which four are finished.

    Args:
      promote: trials that would be finished without a rung.
      fraction: share of the steps after which trials are scored.
      finish: shares of the steps, ascending above ``fraction``; the last one is 1.
    """
    shares = [fraction, *finish]
    doublings = [2**power for power in reversed(range(len(finish)))]
    steps = sum(times * (high - low) for times, (low, high) in zip(doublings, itertools.pairwise(shares), strict=True))
    finished = max(1, round(promote * (1 - fraction) / steps)) if steps > 0 else promote
    return tuple(finished * times for times in doublings)
