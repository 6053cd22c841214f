"""The space: values survive the way to coordinates and back, and a wrong space is named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.search_section import DimensionConfig
from jaxtune.errors import UserError
from jaxtune.search.candidates import random_point
from jaxtune.search.space import Space, canonical

SCALARS = st.one_of(st.booleans(), st.integers(-5, 5), st.floats(-3, 3), st.text(max_size=4), st.none())
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))


@st.composite
def dimensions(draw):
    kind = draw(st.sampled_from(["log_uniform", "uniform", "integer", "power_of_two", "choice"]))
    if kind == "choice":
        values = draw(st.lists(VALUES, min_size=2, max_size=5, unique_by=canonical))
        return DimensionConfig(choice=values)
    if kind == "power_of_two":
        low = draw(st.integers(0, 5))
        return DimensionConfig(power_of_two=(2**low, 2 ** (low + draw(st.integers(1, 5)))))
    if kind == "integer":
        low = draw(st.integers(-20, 20))
        return DimensionConfig(integer=(low, low + draw(st.integers(1, 40))))
    low = draw(st.floats(1e-7, 10))
    return DimensionConfig(**{kind: (low, low * draw(st.floats(1.01, 1e4)))})


@given(st.lists(dimensions(), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_sampled_point_survives_the_round_trip(configs, seed):
    import skopt.space

    space = Space({f"key{index}": config for index, config in enumerate(configs)})
    sampled = skopt.space.Space(space.to_skopt()).rvs(3, random_state=seed)
    for raw in sampled:
        configuration = space.configuration(raw)
        json.dumps(configuration)  # NumPy scalars would raise
        point = space.point(configuration)
        assert point is not None
        assert point in skopt.space.Space(space.to_skopt())
        assert space.configuration(point) == configuration
        assert space.snap(raw) == point
        # The way through the journal changes nothing.
        assert space.point(json.loads(json.dumps(configuration))) == point


@given(dimensions())
@settings(max_examples=60, deadline=None)
def test_bounds_are_inside_and_beyond_is_outside(config):
    space = Space({"key": config})
    dimension = space.dimensions[0]
    for end in (dimension.low, dimension.high):
        assert dimension.encode(dimension.decode(end)) == pytest.approx(end, rel=1e-5)
    if config.kind == "choice":
        assert dimension.encode("not a choice") is None
        return
    assert dimension.encode(abs(dimension.decode(dimension.high)) * 2 + 1) is None
    assert dimension.encode("text") is None
    assert dimension.encode(True) is None
    assert dimension.encode(math.nan) is None


def test_numpy_coordinates_become_plain_values():
    space = Space(
        {
            "a": DimensionConfig(log_uniform=(1e-5, 1e-2)),
            "b": DimensionConfig(power_of_two=(2, 64)),
            "c": DimensionConfig(choice=["x", ["q", "v"], {"k": 1}]),
            "d": DimensionConfig(integer=(1, 9)),
        }
    )
    values = space.configuration([np.float64(0.00012345678), np.int64(3), np.int64(1), np.int64(4)])
    assert values == {"a": 0.000123457, "b": 8, "c": ["q", "v"], "d": 4}
    assert [type(value) for value in values.values()] == [float, int, list, int]


def test_equal_values_of_other_types_are_one_choice():
    dimension = Space({"key": DimensionConfig(choice=[1, 2.5, True, "1", [1, 2]])}).dimensions[0]
    assert [dimension.encode(value) for value in (1.0, True, "1", (1.0, 2), False)] == [0, 2, 3, 4, None]


def test_power_of_two_takes_powers_only():
    dimension = Space({"rank": DimensionConfig(power_of_two=(2, 32))}).dimensions[0]
    assert [dimension.encode(value) for value in (2, 16, 32, 12, 64, 1)] == [1, 4, 5, None, None, None]


def test_a_finite_space_is_listed_and_counted():
    space = Space({"a": DimensionConfig(choice=[True, False]), "b": DimensionConfig(power_of_two=(2, 8))})
    points = [tuple(point) for point in space.points()]
    assert space.size == len(points) == len(set(points)) == 6
    mixed = Space({"a": DimensionConfig(choice=[True, False]), "b": DimensionConfig(uniform=(0, 1))})
    assert mixed.size is None
    with pytest.raises(ValueError, match="continuous"):
        mixed.points()


def test_the_largest_value_of_a_key():
    space = Space({"a": DimensionConfig(choice=[4, 64, 8]), "b": DimensionConfig(power_of_two=(2, 32))})
    assert (space.largest("a"), space.largest("b")) == (64.0, 32.0)
    with pytest.raises(UserError, match="'q' is not a number"):
        Space({"a": DimensionConfig(choice=["q", "v"])}).largest("a")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "search.space is empty"),
        ({"optimizer.learning_rat": {"uniform": (0, 1)}}, "did you mean 'optimizer.learning_rate'"),
        ({"optimizer.learning_rate": {"choice": [1, 1.0]}}, "1.0 is listed twice"),
        ({"optimizer.learning_rate": {"choice": [1, {2}]}}, "not a plain value"),
        ({"update": {"choice": [1, 2]}, "update.0.rank": {"integer": (1, 2)}}, "'update.0.rank' lies inside 'update'"),
    ],
)
def test_a_wrong_space_is_named(space, message):
    known = ["optimizer.learning_rate", "optimizer.warmup", "update", "update.0.rank"]
    with pytest.raises(UserError, match=message):
        Space({key: DimensionConfig(**value) for key, value in space.items()}, known)


@pytest.mark.parametrize(
    "config",
    [
        {"uniform": (0.1234561, 0.1234569)},
        {"log_uniform": (1e-3, 1.0000001e-3)},
        {"uniform": (-1.00000002, -1.00000001)},
        {"uniform": (123456.0, 123456.0001)},
    ],
)
def test_a_narrow_range_holds_values_enough(config):
    """Six digits would round all of it to its ends, and the study would run out of points in its middle."""
    space = Space({"key": DimensionConfig(**config)})
    low, high = next(iter(config.values()))
    (dimension,) = space.dimensions
    values = {dimension.decode(low + (high - low) * share) for share in np.linspace(0, 1, 2001)}
    assert len(values) > 500
    assert all(low <= value <= high for value in values)
    assert all(dimension.decode(value) == value for value in values)
    taken: set[tuple[float, ...]] = set()
    for trial in range(1, 60):
        taken.add(tuple(random_point(space, taken, seed=0, trial=trial)))
    assert len(taken) == 59


@pytest.mark.parametrize(
    ("config", "value", "rounded"),
    [
        ({"log_uniform": (1e-5, 1e-2)}, 0.00123456789, 0.00123457),
        ({"uniform": (0.0, 0.3)}, 0.123456789, 0.123457),
        ({"uniform": (0.1, 0.3)}, 0.123456789, 0.123457),
        ({"uniform": (0.9, 0.9999)}, 0.987654321, 0.987654),
    ],
)
def test_other_ranges_keep_six_digits(config, value, rounded):
    (dimension,) = Space({"key": DimensionConfig(**config)}).dimensions
    assert dimension.decode(value) == rounded


def test_a_range_without_numbers_is_refused():
    with pytest.raises(UserError, match=r"search\.space\.key: uniform \[1\.0, 1\.0000000000000002\] is too narrow"):
        Space({"key": DimensionConfig(uniform=(1.0, math.nextafter(1.0, 2)))})
