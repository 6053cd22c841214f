"""The surrogate: what it proposes repeats, is new, survives bad scores, and finds the good region."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.search_section import DimensionConfig
from jaxtune.search.dependence import partial_dependence
from jaxtune.search.space import Space
from jaxtune.search.surrogate import Observation, Surrogate
from jaxtune.search.warp import Warp

LINE = Space({"x": DimensionConfig(uniform=(0.0, 1.0))})
MIXED = Space(
    {
        "rate": DimensionConfig(log_uniform=(1e-5, 1e-2)),
        "rank": DimensionConfig(power_of_two=(2, 64)),
        "unused": DimensionConfig(uniform=(0.0, 1.0)),
        "targets": DimensionConfig(choice=[["q"], ["q", "v"], ["q", "k", "v"]]),
    }
)


def bowl(configuration) -> float:
    """Best at a rate of 1e-3 with the middle choice; ``unused`` does nothing."""
    return (
        1.0
        + math.log10(configuration["rate"] / 1e-3) ** 2
        + 0.1 * (math.log2(configuration["rank"]) - 4) ** 2
        + 0.3 * (configuration["targets"] != ["q", "v"])
    )


def sampled(space: Space, count: int, seed: int = 0) -> list[Observation]:
    from skopt.space import Space as SkoptSpace

    state = np.random.RandomState(seed)
    points = [space.snap(point) for point in SkoptSpace(space.to_skopt()).rvs(count, random_state=state)]
    return [Observation(point, bowl(space.configuration(point))) for point in points]


@given(st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=1, max_size=12), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_the_warp_keeps_the_order_and_comes_back(scores, scale):
    warp = Warp.fit(scores)
    warped = warp.forward(scores)
    order = np.argsort(scores, kind="stable")
    assert np.all(np.diff(warped[order]) >= 0)
    np.testing.assert_allclose(warp.inverse(warped), scores, rtol=1e-6, atol=1e-6)
    if np.ptp(scores) > 1e-3:
        assert warped.mean() == pytest.approx(0, abs=1e-9)
        assert warped.std() == pytest.approx(1)
        # Neither the unit nor the zero of the score matters.
        other = [scale * score + 7 for score in scores]
        np.testing.assert_allclose(Warp.fit(other).forward(other), warped, atol=1e-3)


def test_the_slope_of_the_warp_is_its_derivative():
    warp = Warp.fit([1.0, 1.5, 4.0, 30.0])
    at, step = np.array([1.2, 3.0, 20.0]), 1e-6
    numeric = (warp.forward(at + step) - warp.forward(at - step)) / (2 * step)
    np.testing.assert_allclose(warp.slope(at), numeric, rtol=1e-5)


def test_a_terrible_score_does_not_flatten_the_good_ones():
    good = [1.0, 1.1, 1.2, 1.3]
    raw = np.array([*good, 1e4])
    standardised = (raw - raw.mean()) / raw.std()
    warped = Warp.fit(raw.tolist()).forward(raw.tolist())
    assert np.ptp(standardised[:4]) < 1e-3
    assert np.ptp(warped[:4]) > 0.15


def test_the_design_fills_the_space():
    points = np.array(Surrogate(LINE, seed=3, initial=9).design())[:, 0]
    assert len(points) == 8, "the reference counts as one point of the design"
    assert sorted(int(8 * point) for point in points) == list(range(8)), "one point in each eighth"
    assert Surrogate(LINE, seed=3, initial=1).design() == []


def test_proposals_repeat_and_depend_on_seed_and_trial():
    told = sampled(MIXED, 7)
    pending = [[5e-4, 3, 0.5, 1]]
    first = Surrogate(MIXED, seed=1, initial=4).propose(8, told, pending)
    again = Surrogate(MIXED, seed=1, initial=4).propose(8, told, pending)
    assert first == again
    assert first.source == "surrogate"
    assert Surrogate(MIXED, seed=2, initial=4).propose(8, told, pending) != first


def test_a_pending_trial_is_not_proposed_again():
    told = sampled(MIXED, 8)
    surrogate = Surrogate(MIXED, seed=1, initial=4)
    first = surrogate.propose(8, told, []).configuration
    point = MIXED.point(first)
    assert point is not None
    second = surrogate.propose(8, told, [point]).configuration
    distance = abs(math.log10(second["rate"] / first["rate"])) + abs(second["unused"] - first["unused"])
    changed = (second["rank"], second["targets"]) != (first["rank"], first["targets"])
    assert changed or distance > 0.05, "the lie pushes the next proposal away from the pending one"


def test_proposals_approach_the_optimum():
    told = sampled(MIXED, 5, seed=4)
    surrogate = Surrogate(MIXED, seed=0, initial=5)
    for trial in range(5, 15):
        configuration = surrogate.propose(trial, told, []).configuration
        point = MIXED.point(configuration)
        assert point is not None
        told.append(Observation(point, bowl(configuration)))
    assert min(one.score for one in told if one.score is not None) < 1.35
    assert min(one.score for one in told[:5] if one.score is not None) > 1.5, "the start must leave something to find"


@pytest.mark.parametrize("only_choices", [False, True])
def test_a_small_space_is_used_up_without_a_repeat(only_choices):
    first = DimensionConfig(choice=[True, False]) if only_choices else DimensionConfig(integer=(1, 2))
    space = Space({"a": first, "b": DimensionConfig(choice=["x", "y", "z"])})
    surrogate = Surrogate(space, seed=0, initial=3)
    told: list[Observation] = []
    for trial in range(6):
        point = space.point(surrogate.propose(trial + 1, told, []).configuration)
        assert point is not None
        told.append(Observation(point, float(trial)))
    assert len({tuple(one.point) for one in told}) == 6
    with pytest.raises(ValueError, match="all 6 configurations"):
        surrogate.propose(7, told, [])


def test_diverged_trials_count_as_the_worst_score():
    told = [Observation([float(x)], float(x)) for x in np.linspace(0, 1, 6)]
    surrogate = Surrogate(LINE, seed=0, initial=2)
    failed = surrogate.propose(6, [*told, Observation([0.9], None)], [])
    worst = surrogate.propose(6, [*told, Observation([0.9], 1.0)], [])
    assert failed == worst


def test_without_a_finite_score_proposals_are_random():
    surrogate = Surrogate(LINE, seed=0, initial=2)
    told = [Observation([0.2], None), Observation([0.8], None)]
    proposals = [surrogate.propose(trial, told, []) for trial in (2, 3)]
    assert [proposal.source for proposal in proposals] == ["random", "random"]
    assert proposals[0] != proposals[1]
    assert surrogate.fit(told) is None
    assert surrogate.promotion_estimates(told) is None


def test_equal_scores_are_no_obstacle():
    told = [Observation([x], 1.0) for x in (0.1, 0.5, 0.9)]
    assert Surrogate(LINE, seed=0, initial=2).propose(3, told, []).source == "surrogate"


def test_exact_scores_keep_their_order_for_promotion():
    told = [Observation(one.point, one.score, 1e-9) for one in sampled(MIXED, 12)]
    estimates = Surrogate(MIXED, seed=0, initial=4).promotion_estimates(told)
    assert estimates is not None
    assert np.argsort(estimates).tolist() == np.argsort([one.score for one in told]).tolist()
    np.testing.assert_allclose(estimates, [one.score for one in told], atol=1e-3)


def test_a_lucky_noisy_score_is_not_promoted_first():
    """A smooth valley around 0.3, and one score far from it that is better than its neighbours by luck."""
    xs = np.linspace(0, 1, 15)
    scores = 1 + 2 * (xs - 0.3) ** 2 + np.random.default_rng(0).normal(0, 0.02, 15)
    lucky = 12
    scores[lucky] = scores.min() - 0.02
    surrogate = Surrogate(LINE, seed=0, initial=2)

    def best(error: float) -> int:
        told = [Observation([float(x)], float(score), error) for x, score in zip(xs, scores, strict=True)]
        estimates = surrogate.promotion_estimates(told)
        assert estimates is not None
        return int(np.argmin(estimates))

    assert best(1e-6) == lucky
    assert abs(xs[best(0.3)] - 0.3) < 0.2


def test_partial_dependence_finds_what_matters_on_the_scale_of_the_score():
    told = sampled(MIXED, 30)
    posterior = Surrogate(MIXED, seed=0, initial=4).fit(told)
    assert posterior is not None
    curves, importance = partial_dependence(posterior)
    assert [curve["key"] for curve in curves] == list(MIXED.keys)
    assert sum(importance.values()) == pytest.approx(1)
    assert importance["rate"] > 0.5
    assert importance["unused"] < 0.1
    rate, rank, _, targets = curves
    lowest = rate["values"][int(np.argmin(rate["mean"]))]
    assert 2e-4 < lowest < 5e-3
    assert rank["values"] == [2, 4, 8, 16, 32, 64]
    assert targets["values"] == [["q"], ["q", "v"], ["q", "k", "v"]]
    assert all(value > 0 for curve in curves for value in curve["standard_deviation"])
    scores = [one.score for one in told if one.score is not None]
    assert min(scores) - 1 < min(rate["mean"]) < max(rate["mean"]) < max(scores) + 1
    negated, _ = partial_dependence(posterior, sign=-1.0)
    np.testing.assert_allclose(negated[0]["mean"], -np.array(rate["mean"]))
