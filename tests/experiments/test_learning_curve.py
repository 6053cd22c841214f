from __future__ import annotations

import numpy as np
import pytest

from jaxtune.evaluation.statistics import ratio
from jaxtune.experiments.learning_curve import Measured, fit_curve, group_curves, saturation

SIZES = (0, 10, 40, 160, 640)
DOCUMENTS, EACH = 40, 5
NAMES = ["common"] * 4 + ["rare"]


def made(seeds: int = 3, noise: float = 0.0, *, strata: bool = False, direction: str = "min") -> Measured:
    """Five questions for each document; one group stays behind until the last size."""
    rng = np.random.default_rng(0)
    sign = 1 if direction == "min" else -1
    curve = 0.5 + sign * np.array([1.0, 0.5, 0.25, 0.1, 0.05])
    late = 0.5 + sign * np.array([1.0, 1.0, 1.0, 1.0, 0.2])
    per_question = np.stack([curve] * 4 + [late], axis=1)
    levels = np.tile(per_question, (1, DOCUMENTS))[:, None, :]
    weights = rng.integers(1, 5, size=DOCUMENTS * EACH).astype(float)
    scores = levels + noise * rng.normal(size=(len(SIZES), seeds, DOCUMENTS * EACH))
    scores[0] = scores[0, :1]
    return Measured.of(
        SIZES,
        scores * weights,
        weights,
        strata=NAMES * DOCUMENTS if strata else None,
        clusters=np.repeat(np.arange(DOCUMENTS), EACH).tolist(),
        direction=direction,  # type: ignore[arg-type]
        limit=0.0 if direction == "min" else 2.0,
    )


@pytest.mark.parametrize("strata", [False, True])
def test_scores_are_ratios_of_sums(strata):
    measured = made(noise=0.3, strata=strata)
    labels = measured.strata.tolist()
    for size in range(len(SIZES)):
        for seed in range(3):
            expected, _ = ratio(measured.numerators[size, seed], measured.weights, strata=labels)
            assert measured.scores()[size, seed] == pytest.approx(expected)


@pytest.mark.parametrize("strata", [False, True])
def test_errors_with_one_seed_are_those_of_the_test_split(strata):
    measured = made(seeds=1, noise=0.5, strata=strata)
    drawn = measured.draws(4000)
    for size in range(len(SIZES)):
        numbers = measured.strata.tolist()
        _, error = ratio(
            measured.numerators[size, 0], measured.weights, strata=numbers, clusters=measured.clusters.tolist()
        )
        assert drawn[:, size].std() == pytest.approx(error, rel=0.1)
        assert drawn[:, size].mean() == pytest.approx(measured.means()[size], abs=0.02)


def test_errors_over_equal_documents_are_those_of_the_seeds():
    levels = np.array([[1.0, 1.0, 1.0], [0.5, 0.7, 0.9], [0.4, 0.4, 0.5], [0.1, 0.2, 0.3]])
    numerators = np.repeat(levels[..., None], 6, axis=-1)
    measured = Measured.of(SIZES[:4], numerators, np.ones(6), strata=None, clusters=None, direction="min", limit=0.0)
    drawn = measured.draws(4000).std(axis=0)
    # The bootstrap's variance of a mean divides by n, not by n - 1.
    assert drawn == pytest.approx(levels.std(axis=1) / np.sqrt(3), rel=0.08, abs=1e-12)


@pytest.mark.parametrize("direction", ["min", "max"])
def test_the_last_gain_is_told_apart_by_group(direction):
    measured = made(direction=direction)
    parts = measured.contributions(-2, -1, NAMES * DOCUMENTS)
    means = measured.means()
    assert sum(parts.values()) == pytest.approx(abs(means[-1] - means[-2]))
    curves = group_curves(measured, NAMES * DOCUMENTS, samples=50)
    assert list(curves) == ["common", "rare"]
    assert curves["rare"]["last_gain"] == pytest.approx(parts["rare"])
    assert parts["rare"] > 3 * parts["common"]
    sign = 1 if direction == "min" else -1
    assert curves["rare"]["scores"] == pytest.approx([0.5 + sign * gap for gap in (1, 1, 1, 1, 0.2)])


def test_saturation_takes_the_smallest_size_within_its_tolerance():
    means = np.array([1.0, 0.5, 0.3, 0.31, 0.3])
    assert saturation(SIZES, means, np.full(5, 0.05), 0.28, "min") == 40
    assert saturation(SIZES, means, np.full(5, 0.001), 0.28, "min") is None
    assert saturation(SIZES, -means, np.full(5, 0.05), -0.28, "max") == 40
    assert saturation(SIZES, means, np.zeros(5), 2.0, "min") == 0, "better than the ceiling is within it"


def test_intervals_hold_the_truth():
    curve = fit_curve(made(noise=0.2), samples=100, confidence=0.9)
    figure = curve.ceiling
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert curve.errors.shape == (5,)
    bought = curve.improvement(640, 1280)
    assert 0 <= bought["low"] <= bought["high"]
    low, high = curve.band([0.0, 100.0, 640.0])
    assert np.all(low <= high)
    assert np.all(low <= curve.law([0, 100, 640]) + 0.05)
