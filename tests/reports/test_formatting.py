from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.reports import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (12.0, "12"), (-3.0, "−3"), (1234567, "1.235e6"), (12345, "12,345"), (0.5, "0.5"), (1 / 3, "0.3333"),
        (1e-4, "1e-4"), (-2.5e-5, "−2.5e-5"), (3.14159e-3, "3.142e-3"), (123.456, "123.5"), (99999.99, "100,000"),
        (None, "–"), (math.nan, "NaN"), (-math.inf, "−∞"),
    ],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert formatting.number(value) == text


@given(st.floats(-1e12, 1e12))
def test_number_keeps_four_digits(value: float) -> None:
    text = formatting.number(value).replace("−", "-").replace(",", "")
    assert math.isclose(float(text), value, rel_tol=5.1e-4, abs_tol=1e-300)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (59, "59 s"), (312, "5 min 12 s"), (11040, "3 h 04 min"), (None, "–")]
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert formatting.seconds(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3e7, "0 s"), (0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3700, "1 h 1 min"), (90000, "1 d 1 h")],
)
def test_age(seconds: float, text: str) -> None:
    assert formatting.age(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "less than a minute"), (49, "less than a minute"), (51, "1 min"), (800, "13 min"), (3540, "59 min"),
     (3600, "1 h"), (12000, "3 h 20 min"), (86400, "24 h")],
)  # fmt: skip
def test_roughly(seconds: float, text: str) -> None:
    assert formatting.roughly(seconds).replace("\u00a0", " ") == text


def test_scores_and_differences() -> None:
    assert formatting.score(0.21344, "loss") == "0.2134"
    assert formatting.score(0.8825, "exact_match").replace("\u00a0", " ") in ("88.2 %", "88.3 %")
    assert formatting.difference(0.021, "f1").replace("\u00a0", " ") == "+2.1 points"
    assert formatting.difference(-0.5, "loss") == "−0.5000"
    assert formatting.score(None, "loss") == formatting.difference(None, "loss") == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not set"),
        (True, "true"),
        (16, "16"),
        (0.000123456, "1.23e-4"),
        (["a", 1], "a, 1"),
        ({"r": 0.5}, "r: 0.5"),
    ],
)
def test_setting(value: object, text: str) -> None:
    assert formatting.setting(value) == text


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, [1]])
def test_finite_takes_numbers_only(value: object) -> None:
    assert formatting.finite(value) is None
    assert formatting.finite(3) == 3.0
