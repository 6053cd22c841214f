from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.experiments.power_law import PowerLaw, fit_power_law

SIZES = [0, 10, 20, 40, 80, 160, 320, 640, 1280]


@pytest.mark.parametrize(
    ("ceiling", "gain", "exponent", "offset"),
    [(0.8, 1.7, 0.5, 12.0), (0.3, 0.6, 1.0, 200.0), (1.1, 2.0, 0.25, 3.0), (0.5, 0.1, 2.0, 900.0)],
)
@pytest.mark.parametrize("direction", ["min", "max"])
def test_parameters_of_an_exact_curve_are_recovered(ceiling, gain, exponent, offset, direction):
    sign = 1 if direction == "min" else -1
    scores = [ceiling + sign * gain * (1 + size / offset) ** -exponent for size in SIZES]
    law = fit_power_law(SIZES, scores, direction=direction)
    assert (law.ceiling, law.gain) == pytest.approx((ceiling, gain), rel=1e-4)
    assert (law.exponent, law.offset) == pytest.approx((exponent, offset), rel=1e-3)
    assert law.coefficient == pytest.approx(gain * offset**exponent, rel=1e-3)
    assert law(SIZES) == pytest.approx(scores, abs=1e-7)
    assert law.residual < 1e-6
    assert law.improvement(640, 1280) == pytest.approx(abs(scores[-1] - scores[-2]), rel=1e-3)


@given(
    scores=st.lists(st.floats(-5, 5), min_size=4, max_size=9),
    direction=st.sampled_from(["min", "max"]),
    limit=st.sampled_from([None, 0.0, 1.0]),
)
@settings(max_examples=15, deadline=None)
def test_any_scores_give_a_curve_that_only_improves_and_stays_within_the_limit(scores, direction, limit):
    law = fit_power_law(SIZES[: len(scores)], scores, direction=direction, limit=limit)
    sign = 1 if direction == "min" else -1
    values = sign * law(SIZES)
    assert np.all(np.diff(values) <= 1e-9)
    assert np.all(values >= sign * law.ceiling - 1e-9)
    if limit is not None:
        assert sign * law.ceiling >= sign * limit
    # No horizontal line is a better fit.
    best = max(sign * np.mean(scores), sign * limit) if limit is not None else sign * np.mean(scores)
    flat = np.sqrt(np.mean((sign * np.array(scores) - best) ** 2))
    assert law.residual <= flat + 1e-9


def test_scores_that_get_worse_give_a_flat_curve():
    law = fit_power_law(SIZES[:5], [1.0, 1.1, 1.2, 1.3, 1.4])
    assert law.gain == 0
    assert law.ceiling == pytest.approx(1.2)
    assert law.size_within(0.01) == 0


def test_the_ceiling_does_not_pass_the_best_possible_score():
    law = fit_power_law(SIZES, [1.0 - 0.1 * step for step in range(len(SIZES))], limit=0.0)
    assert law.ceiling >= 0
    share = fit_power_law(SIZES, [0.1 * step for step in range(len(SIZES))], direction="max", limit=1.0)
    assert share.ceiling <= 1


def test_noise_leaves_the_ceiling_near():
    rng = np.random.default_rng(0)
    truth = 0.8 + 1.5 * (1 + np.array(SIZES) / 15) ** -0.8
    ceilings = [fit_power_law(SIZES, truth + rng.normal(0, 0.005, len(SIZES))).ceiling for _ in range(20)]
    assert np.mean(ceilings) == pytest.approx(0.8, abs=0.02)


def test_size_within_inverts_the_curve():
    law = PowerLaw(0.5, 1.0, 0.7, 20.0, "min", 0.0)
    size = law.size_within(0.05)
    assert law([size])[0] == pytest.approx(0.55)
    assert law.size_within(2.0) == 0
    assert PowerLaw(0.5, 1.0, 1e-3, 20.0, "min", 0.0).size_within(1e-9) == np.inf


def test_too_few_sizes_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="needs 4 sizes"):
        fit_power_law([0, 1, 2], [1.0, 0.5, 0.4])
    with pytest.raises(ValueError, match="finite"):
        fit_power_law(SIZES[:4], [1.0, np.nan, 0.5, 0.4])
