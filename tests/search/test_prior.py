"""Priors: the densities are those of SciPy, draws follow them, proposals begin there and can leave."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import REFERENCE, SPACE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.cli.search import _tell
from jaxtune.config import load_config
from jaxtune.config.search_section import DimensionConfig
from jaxtune.errors import UserError
from jaxtune.reports.headline import prior_sentence
from jaxtune.reports.records import read_study
from jaxtune.search import Study
from jaxtune.search.acquisition import believed, expected_improvement, thompson
from jaxtune.search.candidates import design, untaken
from jaxtune.search.methods import METHODS, make_method
from jaxtune.search.observation import Observation
from jaxtune.search.prior import Marginal, Prior
from jaxtune.search.space import Space

PRIORS = {
    "optimizer.learning_rate": {"prior": 3e-4, "confidence": "high"},
    "update.0.rank": {"prior": 8},
    "update.0.dropout": {"prior": 0.05, "confidence": "low"},
    "optimizer.schedule": {"prior": "linear", "confidence": "medium"},
}
BELIEVED = {key: {**dimension, **PRIORS[key]} for key, dimension in SPACE.items()}
SIGMA = {"low": 0.5, "medium": 0.25, "high": 0.125}


def space_of(**dimensions) -> Space:
    return Space({key: DimensionConfig(**value) for key, value in dimensions.items()})


def normal(centre: float, sigma: float) -> Any:
    """What SciPy calls the cut normal."""
    return scipy.stats.truncnorm(-centre / sigma, (1 - centre) / sigma, centre, sigma)


@given(st.floats(0, 1), st.sampled_from(["low", "medium", "high"]), st.sampled_from(["uniform", "log_uniform"]))
@settings(max_examples=30, deadline=None)
def test_a_range_is_believed_as_a_cut_normal(share, confidence, kind):
    low, high = 1e-5, 1e-2
    at = low * (high / low) ** share if kind == "log_uniform" else low + share * (high - low)
    (dimension,) = space_of(
        key={kind: (low, high), "prior": min(max(at, low), high), "confidence": confidence}
    ).dimensions
    marginal = Marginal(dimension)
    scipys, places = normal(share, SIGMA[confidence]), np.linspace(0.01, 0.99, 25)
    expected = 0.1 + 0.9 * scipys.pdf(places)
    coordinates = [dimension.at(float(place)) for place in places]
    np.testing.assert_allclose(marginal.density(coordinates), expected, rtol=5e-3)
    np.testing.assert_allclose(0.1 * places + 0.9 * scipys.cdf(places), _shares(marginal, places), atol=1e-4)


def _shares(marginal: Marginal, places: np.ndarray) -> np.ndarray:
    """The mass below places, by looking where its quantiles lie."""
    shares = np.linspace(0, 1, 20_001)
    return np.interp(places, marginal.quantiles(shares), shares)


@pytest.mark.parametrize(
    ("config", "values"),
    [({"power_of_two": (2, 64), "prior": 8}, [2, 4, 8, 16, 32, 64]), ({"integer": (3, 9), "prior": 4}, range(3, 10))],
)
def test_whole_values_have_the_mass_of_their_cell(config, values):
    space = space_of(key=config)
    prior, count = Prior(space), len(values)
    points = [point for value in values if (point := space.point({"key": value})) is not None]
    assert len(points) == count
    centre = ([*values].index(config["prior"]) + 0.5) / count
    edges = np.linspace(0, 1, count + 1)
    expected = 0.1 / count + 0.9 * np.diff(normal(centre, 0.25).cdf(edges))
    np.testing.assert_allclose(prior.density(points) / count, expected, rtol=1e-9)
    drawn = prior.points((np.arange(4000)[:, None] + 0.5) / 4000)
    counted = [sum(point == other for other in drawn) / len(drawn) for point in points]
    np.testing.assert_allclose(counted, expected, atol=1e-3)


@pytest.mark.parametrize(("confidence", "weight"), [("low", 2), ("medium", 4), ("high", 6)])
def test_a_choice_weighs_more(confidence, weight):
    space = space_of(key={"choice": [[1], [1, 2], "x"], "prior": [1, 2], "confidence": confidence})
    density = Prior(space).density([[0], [1], [2]])
    np.testing.assert_allclose(density / 3, np.array([1, weight, 1]) / (weight + 2))


def test_dimensions_multiply_and_the_rest_is_uniform():
    both = space_of(a={"uniform": (0, 1), "prior": 0.2}, b={"integer": (1, 9)}, c={"uniform": (0, 2), "prior": 1.5})
    one = space_of(a={"uniform": (0, 1), "prior": 0.2}, b={"integer": (1, 9)}, c={"uniform": (0, 2)})
    other = space_of(a={"uniform": (0, 1)}, b={"integer": (1, 9)}, c={"uniform": (0, 2), "prior": 1.5})
    points = [[0.1, 3, 1.9], [0.9, 8, 0.3]]
    np.testing.assert_allclose(Prior(both).density(points), Prior(one).density(points) * Prior(other).density(points))
    assert Prior.of(space_of(a={"uniform": (0, 1)})) is None
    assert Prior.of(both.without_priors()) is None
    assert Prior.of(both) is not None
    assert np.mean(Prior(one).density([[(at + 0.5) / 5000, 1, 1.0] for at in range(5000)])) == pytest.approx(
        1, abs=1e-3
    )


def test_it_is_forgotten():
    prior, points = Prior(space_of(a={"uniform": (0, 1), "prior": 0.2, "confidence": "high"})), [[0.2], [0.9]]
    ratios = [float(np.divide(*prior.factor(points, scores))) for scores in (0, 1, 2, 4, 20, 1000)]
    assert ratios[0] == ratios[1] == ratios[2] > ratios[3] > ratios[4] > ratios[5]
    assert ratios[3] == pytest.approx(math.sqrt(ratios[0]))
    assert ratios[5] < 1.02
    near = [np.mean([abs(point[0] - 0.2) < 0.1 for point in _draws(prior, trial)]) for trial in (1, 100)]
    # Of the belief's mass within 0.1 of its centre, and of the whole range's.
    held = 0.9 * np.diff(normal(0.2, 0.125).cdf([0.1, 0.3]))[0] + 0.1 * 0.2
    for trial, share in zip((1, 100), near, strict=True):
        kept = 2 / (2 + trial)
        assert share == pytest.approx(kept * held + (1 - kept) * 0.2, abs=0.04)


def _draws(prior: Prior, trial: int):
    return prior.draw(np.random.default_rng(trial), 2000, trial)


def test_a_listed_space_is_drawn_by_weight():
    space = space_of(a={"choice": ["x", "y", "z"], "prior": "y", "confidence": "high"})
    first = [untaken(space, set(), seed=seed, trial=1, count=1)[0][0] for seed in range(800)]
    expected = 2 / 3 * 6 / 8 + 1 / 3 / 3
    assert first.count(1) / len(first) == pytest.approx(expected, abs=0.05)
    assert {point[0] for point in untaken(space, {(1,)}, seed=0, trial=1, count=1)} == {0, 2}


def test_what_is_likely_and_taken_does_not_run_out():
    dimensions = {f"k{at}": {"choice": [0, 1], "prior": 1, "confidence": "high"} for at in range(13)}
    space = space_of(**dimensions)
    taken: set[tuple[float, ...]] = {(1,) * 13}
    assert space.size is not None
    for trial in range(1, 40):
        (point, *_) = untaken(space, taken, seed=0, trial=trial, count=1)
        assert tuple(point) not in taken
        taken.add(tuple(point))


def test_the_design_begins_with_the_prior_and_fills_it():
    space = space_of(
        rate={"log_uniform": (1e-5, 1e-2), "prior": 1e-3, "confidence": "high"}, other={"uniform": (0.0, 1.0)}
    )
    points = design(space, seed=3, count=8)
    assert points[0][0] == 1e-3
    assert points == design(space, seed=3, count=8)
    # One in each eighth of the belief's mass, but for the first, which was moved onto its mode.
    position = np.log10(np.array([point[0] for point in points]) / 1e-5) / 3
    mass = 0.1 * position + 0.9 * normal(2 / 3, 0.125).cdf(position)
    assert len({int(8 * share) for share in mass[1:]}) == 7
    assert len({int(8 * point[1]) for point in points}) == 8
    pinned = Space({key: DimensionConfig(**value) for key, value in BELIEVED.items()}, fixed={"update.0.rank": 2})
    assert {point[1] for point in design(pinned, seed=0, count=4)} == {1}


@pytest.mark.parametrize("name", METHODS)
@given(st.lists(st.none() | st.floats(0.5, 1e4), max_size=8), st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=3, deadline=None)
def test_every_method_begins_with_it_and_repeats(name, scores, seed, trial):
    space = Space({key: DimensionConfig(**value) for key, value in BELIEVED.items()})
    told = [Observation(point, score) for point, score in zip(design(space, seed=1, count=8), scores, strict=False)]
    proposal = make_method(name, space, seed=seed, initial=4).propose(trial, told, [])
    point = space.point(proposal.configuration)
    assert point is not None
    assert point not in [one.point for one in told]
    assert make_method(name, space, seed=seed, initial=4).propose(trial, told, []) == proposal
    first = make_method(name, space, seed=seed, initial=4).propose(1, [], [])
    if first.source == "design":
        assert first.configuration == {key: value["prior"] for key, value in PRIORS.items()}


def test_a_draw_and_an_improvement_are_weighed_alike():
    generator = np.random.default_rng(0)
    worth, factor = generator.normal(size=50), generator.uniform(0.1, 3, 50)
    np.testing.assert_allclose(believed(expected_improvement, abs(worth), factor), abs(worth) * factor)
    # Of Thompson's draws any increasing function would do, and the exponential is the positive one.
    expected = np.argsort(np.exp(worth) * factor)
    assert believed(thompson, worth, factor).argsort().tolist() == expected.tolist()


@pytest.mark.parametrize("acquisition", ["ei", "thompson"])
def test_the_gaussian_process_starts_near_it_and_leaves_where_scores_say_so(acquisition):
    sure = {"x": {"uniform": (0.0, 1.0), "prior": 0.85, "confidence": "high"}}
    told = [Observation([x], 1.0 + (x - 0.2) ** 2) for x in (0.05, 0.35, 0.5, 0.65, 0.85, 0.95)]
    level = [Observation([x], 1.0) for x in (0.05, 0.35, 0.6)]

    def proposed(space: Space, observations: list[Observation]) -> list[float]:
        method = make_method("gp", space, seed=0, initial=3, acquisition=acquisition)
        return [method.propose(trial, observations, []).configuration["x"] for trial in range(10, 16)]

    drawn, plain = (proposed(space, level) for space in (space_of(**sure), space_of(x={"uniform": (0.0, 1.0)})))
    assert np.mean(np.abs(np.array(drawn) - 0.85)) < min(0.15, np.mean(np.abs(np.array(plain) - 0.85)))
    assert np.mean(np.abs(np.array(proposed(space_of(**sure), told)) - 0.2)) < 0.1


def test_a_contradiction_is_as_rare_as_it_says_where_a_belief_says_nothing():
    prior = Prior(space_of(x={"uniform": (0.0, 1.0), "prior": 0.5}, y={"uniform": (0.0, 1.0), "prior": 0.1}))
    generator = np.random.default_rng(0)
    found = [prior.contradicted(generator.random((6, 2)).tolist(), generator.random(6).tolist()) for _ in range(600)]
    assert set(found) == {None, 6}
    # Of the 720 orders of six scores those that Spearman's t calls rarer than one in 20 are 3 to 5 %.
    assert 0.02 < np.mean([one is not None for one in found]) < 0.07
    found = [prior.contradicted(generator.random((20, 2)).tolist(), generator.random(20).tolist()) for _ in range(100)]
    assert 0.05 < np.mean([one is not None for one in found]) < 0.3


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.integers(6, 20))
@settings(max_examples=30, deadline=None)
def test_a_belief_that_scores_follow_stays_and_one_that_they_shun_is_dropped(seed, centre, count):
    prior = Prior(space_of(x={"uniform": (0.0, 1.0), "prior": centre, "confidence": "high"}))
    points = [[float(place)] for place in np.random.default_rng(seed).random(count)]
    likely = prior.density(points)
    if np.ptp(likely) == 0:
        return
    assert prior.contradicted(points, (-likely).tolist()) is None
    assert prior.contradicted(points, likely.tolist()) == 6
    # What was said of the first trials stays, whatever comes.
    assert prior.contradicted(points, [*likely[:6].tolist(), *(-likely[6:]).tolist()]) == 6
    assert prior.contradicted(points[:5], likely[:5].tolist()) is None


@pytest.mark.parametrize("acquisition", ["ei", "thompson"])
def test_without_its_belief_the_gaussian_process_proposes_as_if_there_had_been_none(acquisition):
    sure, plain = (
        space_of(x={"uniform": (0.0, 1.0), **belief}, y={"uniform": (0.0, 1.0)})
        for belief in ({"prior": 0.9, "confidence": "high"}, {})
    )
    told = [Observation([x, 0.5], 1.0 + x) for x in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)]

    def proposed(space: Space, **rules: int) -> list[Any]:
        return [
            make_method("gp", space, seed=0, initial=3, acquisition=acquisition, **rules).propose(trial, told, [])
            for trial in (8, 9)
        ]

    without, dropped, kept = proposed(plain), proposed(sure), proposed(sure, rules=1)
    assert [one.configuration for one in dropped] == [one.configuration for one in without]
    assert [one.prior_dropped for one in (*dropped, *without, *kept)] == [6, 6, None, None, None, None]
    assert [one.configuration for one in kept] != [one.configuration for one in without]


def test_a_study_tells_once_that_it_dropped_its_priors_and_an_older_one_never_does(tmp_path, capsys):
    space = {**SPACE, "optimizer.learning_rate": {"log_uniform": (1e-5, 1e-2), "prior": 1.1e-5, "confidence": "high"}}

    def study(run_dir, runner=None) -> Study:
        search = search_config(space=space, trials=11, promote=1)
        return Study(
            run_dir, search, runner or SyntheticRunner(divergence=1.0), reference=REFERENCE, base={}, on_event=_tell
        )

    whole, parts, runner = tmp_path / "whole", tmp_path / "parts", SyntheticRunner(divergence=1.0)
    summary = study(whole).run()
    assert summary is not None
    dropped = summary.prior_dropped
    assert dropped is not None
    (told,) = [record for record in records(whole) if "prior_dropped" in record]
    assert (told["trial"], told["prior_dropped"]) == (dropped["trial"], dropped["scores"])
    assert capsys.readouterr().err.count("without the priors") == 1
    assert f"From trial {dropped['trial']} on" in prior_sentence(read_study(whole))
    runner.before = interrupt_at(dropped["trial"], 10)
    assert study(parts, runner).run() is None
    assert study(parts).run() == summary
    assert records(parts) == records(whole)
    # A journal that was begun before there was such a test.
    lines = (whole / "trials.jsonl").read_text().splitlines(keepends=True)
    first = {key: value for key, value in json.loads(lines[0]).items() if key != "rules"}
    place = next(at for at, line in enumerate(lines) if "prior_dropped" in line)
    older = tmp_path / "older"
    older.mkdir()
    (older / "trials.jsonl").write_text("".join([json.dumps(first) + "\n", *lines[1:place]]))
    summary = study(older).run()
    assert summary is not None
    assert summary.prior_dropped is None
    assert not any("prior_dropped" in record for record in records(older))


def test_a_stopped_study_goes_on_to_the_same_end(tmp_path):
    def study(run_dir, runner=None) -> Study:
        search = search_config(space=BELIEVED, trials=6, promote=1)
        return Study(run_dir, search, runner or SyntheticRunner(), reference=REFERENCE, base={"name": "test"})

    whole, parts, runner = tmp_path / "whole", tmp_path / "parts", SyntheticRunner()
    summary = study(whole).run()
    assert summary is not None
    assert summary["ended"] == "trials"
    runner.before = interrupt_at(5, 10)
    assert study(parts, runner).run() is None
    assert study(parts).run() is not None
    assert records(parts) == records(whole)
    assert records(whole)[0]["space"]["optimizer.learning_rate"] == {
        "log_uniform": [1e-5, 1e-2], "prior": 3e-4, "confidence": "high"
    }  # fmt: skip
    other = search_config(trials=6, promote=1)
    with pytest.raises(UserError, match=r"search\.space\.optimizer\.learning_rate"):
        Study(parts, other, SyntheticRunner(), reference=REFERENCE, base={"name": "test"}).run()


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ("{log_uniform: [1e-5, 0.1], prior: 3}", r"prior: 3 is none of log_uniform \[1e-05, 0.1\]; .*is 0.1$"),
        ("{integer: [1, 9], prior: 2.4}", r"prior: 2.4 is none of integer \[1, 9\]; the nearest is 2$"),
        ("{power_of_two: [4, 64], prior: 12}", r"prior: 12 is none of power_of_two \[4, 64\]; the nearest is 16$"),
        ("{power_of_two: [4, 64], prior: 0}", "the nearest is 4$"),
        ("{uniform: [0, 1], prior: true}", "prior: True is not a number"),
        ("{choice: [cosine, linear], prior: cosin}", "prior: 'cosin' is not among the choices; did you mean 'cosine'?"),
        ("{uniform: [0, 1], confidence: low}", "confidence: 'low' says how sure a prior is, and there is none"),
        ("{uniform: [0, 1], prior: 0.5, confidence: hihg}", "confidence: 'hihg' is not a choice; did you mean 'high'?"),
    ],
)  # fmt: skip
def test_a_wrong_prior_is_named(tmp_path, dimension, message):
    file = tmp_path / "run.yaml"
    head = "model: {path: x}\ndata: {train: a, prompt: p, completion: c}\ntrain: {steps: 3}\n"
    file.write_text(f"{head}search:\n  space:\n    key: {dimension}\n")
    with pytest.raises(UserError, match=message) as error:
        load_config(file)
    assert str(error.value).startswith(f"{file}:6: search.space.key.")
    assert "\n" not in str(error.value)
