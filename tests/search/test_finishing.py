import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.search.finishing import promotions


@pytest.mark.parametrize(
    ("promote", "fraction", "finish", "expected"),
    [
        (5, 0.2, [1.0], (5,)),
        (5, 0.2, [0.4, 1.0], (8, 4)),  # 8 × 0.2 + 4 × 0.6 = 5 × 0.8
        (1, 0.2, [0.4, 1.0], (2, 1)),
        (5, 1.0, [1.0], (5,)),
    ],
)
def test_the_price_is_that_of_finishing_straight_away(promote, fraction, finish, expected):
    assert promotions(promote, fraction, finish) == expected


@given(
    promote=st.integers(1, 50),
    shares=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=4, unique=True).map(sorted),
)
def test_the_steps_differ_by_less_than_one_more_finished_trial(promote, shares):
    fraction, *finish = [*shares, 1.0]
    numbers = promotions(promote, fraction, finish)
    cost, before = 0.0, fraction
    for number, share in zip(numbers, finish, strict=True):
        cost, before = cost + number * (share - before), share
    unit = cost / numbers[-1]
    assert list(numbers) == [numbers[-1] * 2**power for power in reversed(range(len(finish)))]
    assert abs(cost - promote * (1 - fraction)) <= max(unit / 2 + 1e-9, unit - promote * (1 - fraction))
