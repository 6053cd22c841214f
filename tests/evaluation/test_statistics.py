from __future__ import annotations

import math

import numpy as np
import pytest

from jaxtune.evaluation.statistics import indices, paired_bootstrap, ratio


def test_indices_number_labels_by_appearance():
    assert indices(["b", "a", "b", 3]).tolist() == [0, 1, 0, 2]


def test_ratio_with_unit_weights_is_the_mean_and_its_standard_error():
    values = np.random.default_rng(0).normal(size=50)
    estimate, error = ratio(values, np.ones(50))
    assert estimate == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_duplicating_examples_within_clusters_changes_nothing():
    rng = np.random.default_rng(1)
    y, x = rng.normal(size=30), rng.uniform(1, 5, size=30)
    alone = ratio(y, x)
    doubled = ratio(np.repeat(y, 2), np.repeat(x, 2), clusters=np.repeat(np.arange(30), 2).tolist())
    assert doubled == pytest.approx(alone)


def test_examples_without_weight_are_no_observations():
    y, x = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    padded = ratio(np.append(y, [0.0, 0.0]), np.append(x, [0.0, 0.0]))
    assert padded == pytest.approx(ratio(y, x))


def test_one_cluster_has_no_error_and_no_weight_no_estimate():
    assert ratio(np.array([1.0, 3.0]), np.ones(2), clusters=["a", "a"]) == (2.0, None)
    estimate, error = ratio(np.zeros(2), np.zeros(2))
    assert math.isnan(estimate)
    assert error is None


def test_standard_error_matches_the_spread_of_repeated_samples():
    """Clustered, unequal weights, two strata: the formula against the spread over 400 simulated data sets."""
    rng = np.random.default_rng(2)
    estimates, errors = [], []
    for _ in range(400):
        cluster = np.repeat(np.arange(60), 4)
        stratum = np.tile([0, 0, 0, 1], 60)
        x = rng.integers(1, 6, size=240).astype(float)
        y = x * (1.0 + stratum + rng.normal(size=60)[cluster] + 0.5 * rng.normal(size=240))
        estimate, error = ratio(y, x, strata=stratum.tolist(), clusters=cluster.tolist())
        estimates.append(estimate)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.12)
    assert np.mean(estimates) == pytest.approx(1.5, abs=0.03)


def test_bootstrap_covers_and_is_narrower_when_paired():
    rng = np.random.default_rng(3)
    hard = rng.normal(size=300)
    first, second = hard + 0.1 + 0.2 * rng.normal(size=300), hard + 0.2 * rng.normal(size=300)
    result = paired_bootstrap(first, second, np.ones(300), samples=1000)
    assert result.difference == pytest.approx((first - second).mean())
    assert result.low < result.difference < result.high
    error = (first - second).std(ddof=1) / math.sqrt(300)
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.12)


def test_bootstrap_is_repeatable_and_zero_for_equal_systems():
    values = np.random.default_rng(4).normal(size=40)
    other = values[::-1].copy()
    first = paired_bootstrap(values, other, np.ones(40), samples=300, seed=5)
    assert first == paired_bootstrap(values, other, np.ones(40), samples=300, seed=5)
    same = paired_bootstrap(values, values, np.ones(40), samples=100)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_bootstrap_draws_clusters():
    """With every document repeated four times the interval is that of the documents, not four times too sure."""
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=80), rng.normal(size=80)
    alone = paired_bootstrap(first, second, np.ones(80), samples=1000)
    documents = np.repeat(np.arange(80), 4).tolist()
    repeated = paired_bootstrap(
        np.repeat(first, 4),
        np.repeat(second, 4),
        np.ones(320),
        clusters=documents,
        samples=1000,
    )
    assert repeated.difference == pytest.approx(alone.difference)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=1e-6)
