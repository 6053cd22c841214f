"""Where gains end by the gap to the largest size."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune.experiments.learning_curve import Measured
from jaxtune.experiments.saturation import gaps_to_largest

SIZES = (0, 50, 200, 650, 1300)
DOCUMENTS, SEEDS = 300, 40


def made(scores, direction: str = "max") -> Measured:
    return Measured.of(
        SIZES, scores, np.ones(scores.shape[-1]), strata=None, clusters=None, direction=direction, limit=None
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", ["min", "max"])
def test_what_is_the_same_for_all_sizes_cancels(direction):
    """Hard documents and lucky seeds, far larger than the gaps, leave the bound at that of the paired difference."""
    rng = np.random.default_rng(0)
    sign = 1.0 if direction == "min" else -1.0
    level = sign * np.array([1.0, 0.5, 0.09, 0.02, 0.0])
    shared = 3.0 * rng.normal(size=(1, 1, DOCUMENTS)) + 2.0 * rng.normal(size=(1, SEEDS, 1))
    own = 0.2 * rng.normal(size=(len(SIZES), 1, DOCUMENTS)) + 0.1 * rng.normal(size=(len(SIZES), SEEDS, 1))
    scores = level[:, None, None] + shared + own
    gaps = gaps_to_largest(made(scores, direction), samples=4000)
    for place, gap in enumerate(gaps):
        paired = sign * (scores[place] - scores[-1])
        error = np.hypot(
            paired.mean(axis=0).std(ddof=1) / np.sqrt(DOCUMENTS), paired.mean(axis=1).std(ddof=1) / np.sqrt(SEEDS)
        )
        assert gap.gap == pytest.approx(paired.mean())
        assert gap.bound == pytest.approx(paired.mean() + 1.645 * error, abs=0.15 * error + 1e-9)
    assert [gap.size for gap in gaps] == [0, 50, 200, 650]
    assert [gap.is_small for gap in gaps] == [gap.bound < 0.1 * gaps[0].gap for gap in gaps]
    assert [gap.is_small for gap in gaps] == [False, False, False, True], "0.09 is below a tenth, its bound is not"


def test_without_a_gain_no_size_is_enough():
    scores = np.tile(np.random.default_rng(1).normal(size=(1, 2, DOCUMENTS)), (len(SIZES), 1, 1))
    assert not any(gap.is_small for gap in gaps_to_largest(made(scores), samples=200))
