"""Agreement of early with final scores, against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxtune.experiments.agreement import (
    agreement,
    draw_trials,
    interval,
    kendall,
    regret,
    regret_interval,
    spearman,
    top_overlap,
)

SCORE = st.one_of(st.integers(0, 6).map(float), st.floats(-3, 3, allow_nan=False), st.just(math.inf))
PAIRS = st.lists(st.tuples(SCORE, SCORE), min_size=3, max_size=12)


@settings(max_examples=60, deadline=None)
@given(PAIRS)
@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_correlations_are_those_of_scipy_over_trials_with_two_scores(pairs):
    early, final = np.array(pairs, np.float64).T
    used = np.isfinite(early) & np.isfinite(final)
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        got = float(ours(early[None], final[None])[0])
        wanted = theirs(early[used], final[used]).statistic if used.sum() >= 2 else math.nan
        assert got == pytest.approx(wanted, abs=1e-9, nan_ok=True)


def test_every_draw_is_computed_as_by_itself():
    generator = np.random.default_rng(3)
    early = generator.normal(size=9)
    final = early + generator.normal(size=9)
    early[4] = final[4] = final[2] = math.inf
    drawn = draw_trials(9, 40, seed=5)
    assert drawn.shape == (40, 9)
    for measure in (spearman, kendall, top_overlap, regret):
        whole = measure(early[drawn], final[drawn])
        single = [float(measure(early[row][None], final[row][None])[0]) for row in drawn]
        np.testing.assert_allclose(whole, single)


def test_leading_groups_and_regret_by_hand():
    #                 0    1    2    3    4    5         6
    early = np.array([0.1, 0.2, 0.2, 0.4, 0.5, math.inf, 0.3])
    final = np.array([0.9, 0.5, 0.4, 0.1, 0.2, math.inf, math.inf])

    def of(measure, *options):
        return float(measure(early[None], final[None], *options)[0])

    assert of(top_overlap, 2) == 0  # {0, 1} against {3, 4}: of equal scores the earlier trial comes first
    assert of(top_overlap, 5) == 4  # {0, 1, 2, 6, 3} against {3, 4, 2, 1, 0}
    lost = np.array([[1.0, 2.0, math.inf, math.inf, math.inf, math.inf]])
    assert top_overlap(lost, lost)[0] == 2  # what diverged leads nothing, alike as it may be on both sides
    assert of(regret) == pytest.approx(0.8)
    assert of(regret, 3) == pytest.approx(0.3)
    assert of(regret, 7) == 0
    assert float(regret(final[None], early[None])[0]) == pytest.approx(0.3)  # trial 3 is chosen, 0 would be best
    nothing = np.full((1, 3), math.inf)
    assert math.isnan(regret(nothing, nothing)[0])
    assert math.isinf(regret(np.array([[0.1, 0.2]]), np.array([[math.inf, 0.2]]))[0])


def test_an_interval_holds_the_asked_share_of_draws():
    drawn = np.random.default_rng(0).normal(size=20_000)
    found = interval(0.0, drawn, 0.9)
    assert (found.low, found.high) == (pytest.approx(-1.645, abs=0.05), pytest.approx(1.645, abs=0.05))
    holes = interval(0.0, np.array([math.nan, 1.0, math.nan, 1.0]), 0.9)
    assert (holes.low, holes.high) == (1.0, 1.0)
    assert interval(math.nan, np.array([math.nan]), 0.9).as_dict() == {"value": None, "low": None, "high": None}


def test_the_bootstrap_of_a_correlation_covers_what_is_known_of_it():
    """Of bivariate normal scores with correlation 0.8 Spearman's is (6 / π) asin(0.4) = 0.786 (Pearson 1907)."""
    covered = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        early = generator.normal(size=40)
        final = 0.8 * early + 0.6 * generator.normal(size=40)
        drawn = draw_trials(40, 200, seed)
        found = interval(0.0, spearman(early[drawn], final[drawn]), 0.9)
        covered += found.low <= 6 / math.pi * math.asin(0.4) <= found.high
    assert 29 <= covered <= 40  # 36 expected; below 29 has a probability of 0.1 %


@pytest.mark.parametrize("k", [1, 5])
def test_the_interval_of_a_regret_covers_the_mean_regret_of_other_designs(k):
    """Early scores that say little, and those that say all but now and then choose wrongly."""
    generator = np.random.default_rng(0)
    for correlation in (0.6, 0.95):
        final, other = generator.normal(size=(2, 20_000, 24))
        early, final = correlation * final + math.sqrt(1 - correlation**2) * other, np.exp(final)
        mean = regret(early, final, k).mean()
        found = [regret_interval(early[design], final[design], k, samples=400, confidence=0.95) for design in range(60)]
        covered = sum(one.low <= mean <= one.high for one in found)
        assert covered >= 52  # 57 expected at 95 %; fewer than 52 has a probability of 1 % there
        assert all(one.low <= one.value <= one.high for one in found)


def test_perfect_and_reversed_order():
    scores = np.arange(12.0)
    same = agreement(scores, scores, promote=3, samples=200, confidence=0.95)
    assert same["spearman"] == same["kendall"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert same["top_5_overlap"] == {"value": 5.0, "low": 5.0, "high": 5.0}
    assert same["regret"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    against = agreement(scores, -scores, promote=3, samples=200, confidence=0.95)
    assert against["spearman"]["value"] == against["kendall"]["high"] == -1.0
    assert against["regret"]["value"] == 11.0
    assert against["regret_promoted"]["value"] == 9.0
