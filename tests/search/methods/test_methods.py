"""All search methods: what they propose lies in the space, is new, and repeats."""

from __future__ import annotations

import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.search_section import METHODS_WITHOUT_MODEL, DimensionConfig, SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.acquisition import ACQUISITIONS
from jaxtune.search.methods import METHODS, make_method
from jaxtune.search.methods.optuna_study import empty_study, told_trials
from jaxtune.search.observation import Observation, Proposal, finite_scores
from jaxtune.search.space import Space

MIXED = Space(
    {
        "rate": DimensionConfig(log_uniform=(1e-5, 1e-2)),
        "share": DimensionConfig(uniform=(0.0, 0.3)),
        "rank": DimensionConfig(power_of_two=(2, 64)),
        "layers": DimensionConfig(integer=(1, 12)),
        "targets": DimensionConfig(choice=[["q"], ["q", "v"], ["q", "k", "v"]]),
    }
)
INITIAL = 4

coordinates = st.tuples(
    st.floats(-5, -2).map(lambda exponent: 10**exponent),
    st.floats(0, 0.3),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 2),
).map(MIXED.snap)
scores = st.none() | st.floats(0.5, 1e4)


def valley(configuration) -> float:
    """Best at a rate of 1e-3; the rest matters little."""
    return 1 + math.log10(configuration["rate"] / 1e-3) ** 2 + 0.01 * configuration["layers"]


@pytest.mark.parametrize("name", METHODS)
@given(
    told=st.lists(st.tuples(coordinates, scores, st.none() | st.integers(1, 9)), max_size=12),
    pending=st.lists(coordinates, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    trial=st.integers(1, 40),
)
@settings(max_examples=15, deadline=None)
def test_a_proposal_is_in_the_space_new_and_repeats(name, told, pending, seed, trial):
    observations = [Observation(point, score, None, stopped) for point, score, stopped in told]
    proposal = make_method(name, MIXED, seed=seed, initial=INITIAL).propose(trial, observations, pending)
    point = MIXED.point(proposal.configuration)
    assert point is not None
    assert MIXED.configuration(point) == proposal.configuration
    assert point not in [*(one.point for one in observations), *pending]
    # A study that was killed asks a method that has seen nothing.
    again = make_method(name, MIXED, seed=seed, initial=INITIAL).propose(trial, observations, pending)
    assert again == proposal
    assert all(type(value) in (int, float, list) for value in proposal.configuration.values())


@pytest.mark.parametrize("name", METHODS)
def test_seed_and_trial_change_the_proposal(name):
    told = [Observation(point, valley(MIXED.configuration(point))) for point in _random_points(12)]
    made = [make_method(name, MIXED, seed=seed, initial=INITIAL).propose(trial, told, [])
            for seed, trial in [(0, 12), (1, 12), (0, 13)]]  # fmt: skip
    assert made[0] != made[1]
    assert made[0] != made[2]
    assert {one.source for one in made} == {{"random": "random", "sobol": "design"}.get(name, "surrogate")}


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_calls_does_not_matter(name):
    told = [Observation(point, valley(MIXED.configuration(point))) for point in _random_points(8)]
    method = make_method(name, MIXED, seed=5, initial=INITIAL)
    forwards = [method.propose(trial, told[:count], []) for trial, count in [(3, 2), (8, 7), (9, 8)]]
    backwards = [method.propose(trial, told[:count], []) for trial, count in [(9, 8), (8, 7), (3, 2)]]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("name", METHODS)
def test_a_small_space_is_used_up_without_a_repeat(name):
    space = Space({"a": DimensionConfig(integer=(1, 2)), "b": DimensionConfig(choice=["x", "y", "z"])})
    method = make_method(name, space, seed=0, initial=3)
    told: list[Observation] = []
    for trial in range(1, 7):
        point = space.point(method.propose(trial, told, []).configuration)
        assert point is not None
        told.append(Observation(point, float(trial)))
    assert len({tuple(one.point) for one in told}) == 6
    with pytest.raises(ValueError, match="all 6 configurations"):
        method.propose(7, told, [])


def test_the_sequence_shares_the_values_of_a_key_evenly():
    """64 points of a (0, m, s)-net in base 2: one in each 64th of every coordinate."""
    space = Space(
        {
            "rate": DimensionConfig(log_uniform=(1e-4, 1e-2)),
            "layers": DimensionConfig(integer=(5, 12)),
            "rank": DimensionConfig(power_of_two=(4, 32)),
            "targets": DimensionConfig(choice=["a", "b", "c"]),
        }
    )
    method = make_method("sobol", space, seed=3, initial=INITIAL)
    made = [method.propose(trial, [], []).configuration for trial in range(1, 65)]
    for key, values in [("layers", range(5, 13)), ("rank", (4, 8, 16, 32))]:
        assert Counter(one[key] for one in made) == {value: 64 // len(values) for value in values}
    assert set(Counter(one["targets"] for one in made).values()) <= {21, 22}
    places = sorted((math.log10(one["rate"]) + 4) / 2 for one in made)
    assert [int(64 * place) for place in places] == list(range(64))


@pytest.mark.parametrize("name", ["gp", "tpe", "hyperband"])
def test_methods_that_learn_go_where_scores_are_good(name):
    """Medians over twenty trials: what is proposed lies nearer to the best rate than what chance proposes."""
    told = [Observation(point, valley(MIXED.configuration(point))) for point in _random_points(30)]

    def distance(method: str) -> float:
        made = make_method(method, MIXED, seed=1, initial=INITIAL)
        rates = [made.propose(trial, told, []).configuration["rate"] for trial in range(30, 50)]
        return float(np.median(np.abs(np.log10(rates) + 3)))

    assert distance(name) < 0.5 * distance("random")


@pytest.mark.parametrize("name", ["tpe", "hyperband"])
def test_a_stopped_trial_counts_as_a_bad_one(name):
    """The lowest scores are those of stopped trials: told as complete they draw the proposals, told as stopped not."""
    points = _random_points(30)
    good = [Observation(point, 2 + valley(MIXED.configuration(point))) for point in points]

    def distance(stopped: int | None) -> float:
        decoys = [Observation([1e-5 * (1 + k / 9), 0.1, 3, 6, 0], 0.5, None, stopped) for k in range(6)]
        method = make_method(name, MIXED, seed=1, initial=INITIAL)
        rates = [method.propose(trial, good + decoys, []).configuration["rate"] for trial in range(36, 46)]
        return float(np.median(np.abs(np.log10(rates) + 3)))

    assert distance(2) < 1 < distance(None)


@pytest.mark.parametrize("name", ["gp", "random", "sobol", "tpe"])
def test_only_hyperband_stops_trials(name):
    method = make_method(name, MIXED, seed=0, initial=INITIAL)
    assert method.rungs(100) == ()
    assert not method.stops(1, 100, {0: {11: 1.0}, 1: {11: 9.0}})


@pytest.mark.parametrize("name", ["tpe", "hyperband"])
def test_a_missing_optuna_is_named_before_any_trial(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=rf"{name}.*pip install 'jaxtune\[optuna\]'"):
        make_method(name, MIXED, seed=0, initial=INITIAL)
    make_method("gp", MIXED, seed=0, initial=INITIAL)


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no method 'hyperbandit'; did you mean 'hyperband'"):
        make_method("hyperbandit", MIXED, seed=0, initial=INITIAL)


def test_the_configuration_names_all_methods_and_acquisitions():
    annotation = SearchConfig.model_fields["method"].annotation
    assert list(METHODS) == list(annotation.__args__)
    named, unset = SearchConfig.model_fields["acquisition"].annotation.__args__
    assert (list(ACQUISITIONS), unset) == (list(named.__args__), type(None))
    # Those that never look at a score propose the same whatever was told.
    told = [[Observation(point, float(score)) for point, score in zip(_random_points(4), order, strict=True)]
            for order in (range(4), range(4, 0, -1))]  # fmt: skip
    alike = [name for name in METHODS if _proposed(name, told[0]) == _proposed(name, told[1])]
    assert alike == list(METHODS_WITHOUT_MODEL)


def _proposed(name: str, told: list[Observation]) -> Proposal:
    return make_method(name, MIXED, seed=0, initial=1).propose(5, told, [])


def _random_points(count: int) -> list:
    from skopt.space import Space as SkoptSpace

    state = np.random.RandomState(count)
    return [MIXED.snap(point) for point in SkoptSpace(MIXED.to_skopt()).rvs(count, random_state=state)]


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_with_one_finite_score_what_diverged_is_worse(name):
    """All but one diverge, at high rates; what is proposed lies nearer to the one that did not."""
    good, bad = [1e-4, 0.1, 3, 6, 0], [[1e-2 / (1 + k / 9), 0.1, 3, 6, 0] for k in range(6)]
    told = [*(Observation(point, None) for point in bad), Observation(good, 2.0)]
    method = make_method(name, MIXED, seed=1, initial=INITIAL)
    rates = [method.propose(trial, told, []).configuration["rate"] for trial in range(7, 17)]
    assert float(np.median(np.abs(np.log10(rates) + 4))) < 0.9


def test_what_diverged_is_worse_than_what_was_stopped():
    """Told to Optuna as complete, it would be better than every stopped trial."""
    pytest.importorskip("optuna")
    from optuna.samplers._tpe.sampler import _split_trials

    points = _random_points(12)
    told = [Observation(points[0], 1.0), Observation(points[1], 3.0, None, 1), Observation(points[2], 2.0, None, 2)]
    made = told_trials(MIXED, [*told, Observation(points[3], None)], [points[4]])
    _, above = _split_trials(empty_study(), made, 3)
    assert [trial.params for trial in above] == [made[3].params, made[4].params]


@given(st.lists(scores, min_size=1, max_size=8).filter(lambda values: any(value is not None for value in values)))
def test_a_diverged_trial_never_ties_with_the_best(values):
    filled = finite_scores([Observation([0.0], value) for value in values])
    best = min(value for value in values if value is not None)
    worst = max(value for value in values if value is not None)
    for value, number in zip(values, filled, strict=True):
        assert number == value if value is not None else number > best
        assert value is not None or number == worst or worst == best
