"""What an overlap of leading groups is worth beside: smaller designs, chance, and a guess by one hyperparameter.

How many of the five best early trials are among the five best at the end depends on how many trials there are: of ten,
half are among the five best by chance; of sixty-four, the five best lie close together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from jaxtune.experiments.agreement import TOP, spearman, top_overlap

DESIGN_SIZES = (8, 12, 16, 20, 24, 32, 48, 64)
"""Numbers of trials that an overlap is told for, up to that of the design."""

_SAMPLES = 4000


def overlap_by_size(
    early: Float[np.ndarray, " n"], final: Float[np.ndarray, " n"], *, claimed: int, k: int = TOP, seed: int = 0
) -> list[Mapping[str, Any]]:
    """The overlap that designs of fewer of the same trials have, drawn without replacement in random order.

    So equal scores are broken by chance, the whole design's included.

    Args:
      early: score of each trial at the fraction, lower is better; infinite where it had diverged.
      final: score at the end, likewise.
      claimed: an overlap; how often designs reach it is told.
      k: size of the leading groups.
      seed: of the draws.

    Returns:
      For each size ``trials``, ``expected`` (mean overlap), ``reaches`` (share of designs with ``claimed`` or more) and
      ``by_chance`` (the mean overlap of two random orders, k² / n).
    """
    generator, count = np.random.default_rng(seed), len(early)
    sizes = [*(size for size in DESIGN_SIZES if k < size < count), count]
    orders = np.argsort(generator.random((_SAMPLES, count)), axis=1)
    found = []
    for size in sizes:
        drawn = orders[:, :size]
        overlap = top_overlap(early[drawn], final[drawn], k)
        found.append(
            {
                "trials": size,
                "expected": float(overlap.mean()),
                "reaches": float((overlap >= claimed).mean()),
                "by_chance": k * k / size,
            }
        )
    return found


def known_alone(
    values: Sequence[float], final: Float[np.ndarray, " n"], k: int = TOP
) -> Mapping[str, float | int | None]:
    """How well the final order is foretold by one hyperparameter, known of all other trials' ends.

    Each trial's final rank is foretold by least squares through the others: a quadratic in the logarithm of the value.
    Ranks, as one bad score would bend a curve through scores; a trial that diverged has the last rank.

    Args:
      values: of the hyperparameter, one a trial, positive.
      final: scores, lower is better; infinite where a trial diverged.
      k: size of the leading groups.

    Returns:
      ``overlap`` (of the ``k`` foretold to be best, how many are) and ``spearman`` (None where all are foretold alike).
    """
    x = np.log(np.asarray(values, np.float64))
    x = x - x.mean()
    ranks = stats.rankdata(final)
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    foretold = np.empty_like(x)
    for place in range(len(x)):
        others = np.arange(len(x)) != place
        weights = np.linalg.lstsq(design[others], ranks[others], rcond=None)[0]
        foretold[place] = design[place] @ weights
    varied = np.ptp(foretold) > 0 and np.ptp(ranks) > 0
    return {
        "overlap": int(top_overlap(foretold[None], final[None], k)[0]),
        "spearman": float(spearman(foretold[None], ranks[None])[0]) if varied else None,
    }
