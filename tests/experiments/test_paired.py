"""Paired intervals, against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jaxtune.experiments.paired import paired_interval


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_interval_is_the_paired_t_test_s(seeds):
    generator = np.random.default_rng(seeds)
    first, second = generator.normal(size=seeds).tolist(), generator.normal(size=seeds).tolist()
    found, pairs = paired_interval(first, second, 0.9)
    wanted = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert pairs == seeds
    assert (found.low, found.high) == (pytest.approx(wanted.low), pytest.approx(wanted.high))
    assert found.value == pytest.approx(np.mean(first) - np.mean(second))


def test_pairs_with_a_diverged_run_do_not_count():
    found, pairs = paired_interval([1.0, math.nan, 3.0], [0.5, 1.0, 1.5], 0.95)
    assert (found.value, pairs) == (1.0, 2)
    alone, pairs = paired_interval([1.0, math.inf], [0.5, 1.0], 0.95)
    assert (alone.value, pairs) == (0.5, 1)
    assert math.isnan(alone.low)
    assert paired_interval([math.nan], [1.0], 0.95)[1] == 0
