from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.reports import svg
from jaxtune.reports.space_figures import key_scale, short_key


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_linear_ticks_are_round_inside_and_few(low: float, width: float, most: int) -> None:
    scale = svg.linear([low, low + width])
    ticks = [value for value, _ in scale.ticks(most)]
    assert len(ticks) <= most + 1
    margin = (scale.high - scale.low) * 1e-6
    assert all(scale.low - margin <= value <= scale.high + margin for value in ticks)
    steps = {round((b - a) / (scale.high - scale.low), 6) for a, b in itertools.pairwise(ticks)}
    assert len(steps) <= 1 or width < 1e-5 * abs(low)


@given(st.floats(1e-9, 1e3), st.floats(1.5, 1e6), st.sampled_from([2.0, 10.0]))
def test_logarithmic_ticks_lie_inside(low: float, factor: float, base: float) -> None:
    scale = svg.logarithmic([low, low * factor], base=base)
    ticks = [value for value, _ in scale.ticks(6)]
    assert ticks == sorted(ticks)
    assert all(scale.low * 0.999 <= value <= scale.high * 1.001 for value in ticks)
    assert len(ticks) <= 12


def test_zero_stands_below_the_powers_of_a_logarithmic_scale() -> None:
    """A reference without weight decay, among trials whose decay is drawn log-uniformly."""
    scale = key_scale({"log_uniform": [1e-4, 0.1]}, [0, 1e-4, 0.02])
    assert scale.ticks(6) == [(0.0, "0"), (1e-4, "1e-4"), (1e-3, "1e-3"), (0.01, "0.01"), (0.1, "0.1")]
    places = [scale(value) for value in (0, 1e-4, 1e-3, 0.01, 0.1)]
    assert places == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert key_scale({"log_uniform": [1e-4, 0.1]}, [-1.0]).base is None


def test_scales_place_values() -> None:
    assert svg.Scale(0, 10, 100, 200)(5) == 150
    assert svg.Scale(1, 100, 0, 200, base=10)(10) == pytest.approx(100)
    assert svg.Scale(0, 2, 0, 1, categories=("a", "b", "c")).over(10, 30)("b") == 20
    assert svg.linear([3, 3])(3) > 0  # one value alone still has a place
    assert svg.for_scores([0.1, 5.0]).base
    assert svg.for_scores([0.1, 0.5]).base is None
    assert svg.for_scores([-1.0, 5.0]).base is None


def test_key_scale_holds_what_lies_outside_the_bounds() -> None:
    scale = key_scale({"log_uniform": [1e-4, 1e-2]}, [1e-5, 1e-3]).over(0, 1)
    assert scale(1e-5) == pytest.approx(0)
    assert scale(1e-2) == pytest.approx(1)
    assert key_scale({"power_of_two": [4, 64]}, [16]).ticks()[0][0] == 4
    assert key_scale({"choice": [8, 16]}, [32]).categories == ("8", "16", "32")
    assert key_scale({"choice": [["a", "b"], None]}, []).categories == ("a, b", "not set")
    assert key_scale({"integer": [1, 8]}, ["odd", 2]).categories  # a value of another type: no order to rely on
    assert not math.isnan(key_scale({}, [])("not set"))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.3, 2.8], ["0.5", "1", "2"]),
        ([1e-5, 3e-2], ["1e-5", "1e-4", "1e-3", "0.01"]),
        ([0.4, 60], ["1", "3", "10", "30"]),
        ([1.0, 1.2], ["1", "1.05", "1.1", "1.15", "1.2"]),
    ],
)
def test_logarithmic_ticks_are_round(values: list[float], labels: list[str]) -> None:
    assert [label for _, label in svg.logarithmic(values, margin=0.0).ticks(5)] == labels


def test_clip_keeps_both_ends() -> None:
    assert svg.clip("layers.*.attention.{q,v}", 12) == "layer….{q,v}"
    assert svg.clip("short", 12) == "short"
    assert len(svg.clip("layers", 1)) <= 3


def test_short_key_is_the_shortest_unambiguous_tail() -> None:
    keys = ["update.0.rank", "update.1.rank", "optimizer.warmup", "rank_scale"]
    assert [short_key(key, keys) for key in keys] == ["0.rank", "1.rank", "warmup", "rank_scale"]


def test_text_and_attributes_are_escaped() -> None:
    node = svg.element(None, "text", "<b>&", class_='"x"', data_trial=None, x=1.25, y=2.0)
    assert ET.fromstring(svg.to_text(node)).text == "<b>&"
    assert node.attrib == {"class": '"x"', "x": "1.2", "y": "2"}
