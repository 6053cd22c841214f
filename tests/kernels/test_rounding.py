from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtune_kernels.rounding import random_words, round_stochastically, three_halves

ROWS, COLUMNS = 256, 1024


def _words(seed=3, rows=ROWS, columns=COLUMNS, first=0):
    down = jnp.arange(first, first + rows, dtype=jnp.uint32)[:, None]
    return random_words(jnp.uint32(seed), down, jnp.arange(columns, dtype=jnp.uint32)[None])


def _agreement(first, second) -> float:
    """Correlation of the upper halves, in units of the deviation that independent words would give."""
    first, second = (np.asarray(words >> 16).astype(np.float64) - 32767.5 for words in (first, second))
    return float((first * second).mean() / (first.std() * second.std()) * np.sqrt(first.size))


@pytest.mark.parametrize("value", [1.0 + 2.0**-9, -3.1415927, 1e-30, 257.3, 0.1, -65503.7])
def test_unbiased(value):
    """The mean of n roundings lies within five deviations; each is one of the two neighbours."""
    exact = np.float32(value)
    bits = exact.view(np.uint32)
    down = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    up = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    share = (bits & np.uint32(0xFFFF)) / 2.0**16
    for words in three_halves(_words()):
        rounded = np.asarray(round_stochastically(jnp.full(words.shape, exact), words)).astype(np.float32)
        assert set(np.unique(rounded)) == {down, up}
        bound = 5 * np.sqrt(share * (1 - share) / rounded.size)
        assert abs(np.mean(rounded == up) - share) < bound
        assert abs((rounded.astype(np.float64).mean() - exact) / (up.astype(np.float64) - down)) < bound


def test_what_bfloat16_holds_stays():
    subnormal = np.uint32(0x00010000).view(np.float32)
    values = np.asarray([0.0, -0.0, 1.0, -1.5, 3.3895314e38, np.inf, -np.inf, subnormal], np.float32)
    words = jnp.full(values.shape, 0xFFFFFFFF, jnp.uint32)
    rounded = np.asarray(round_stochastically(jnp.asarray(values), words))
    np.testing.assert_array_equal(rounded.view(np.uint16), values.view(np.uint32) >> 16)


def test_nan_stays_nan():
    payloads = np.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)
    words = jnp.full(payloads.shape, 0xFFFFFFFF, jnp.uint32)
    assert np.isnan(np.asarray(round_stochastically(jnp.asarray(payloads), words)).astype(np.float32)).all()


def test_small_steps_add_up():
    """Four hundred steps of a hundredth of a unit in the last place: rounding to nearest would not move at all."""
    value = jnp.full((64,), 1.0, jnp.bfloat16)
    step = 2.0**-7 / 100
    rows = jnp.arange(64, dtype=jnp.uint32)
    for number in range(400):
        word = random_words(jnp.uint32(number), rows, jnp.uint32(0))
        value = round_stochastically(value.astype(jnp.float32) + step, word)
    # Each of 64 walks gains 4 units with a variance of about 4.
    gained = (np.asarray(value).astype(np.float64).mean() - 1.0) / 2.0**-7
    assert abs(gained - 4.0) < 5 * np.sqrt(4.0 / 64)


def test_words_are_independent():
    words = _words()
    for shift in (1, 2, 3, 64):
        assert abs(_agreement(words[shift:], words[:-shift])) < 5
        assert abs(_agreement(words[:, shift:], words[:, :-shift])) < 5
    for seed in (2, 4, 3 + 2**16, 0):
        assert abs(_agreement(words, _words(seed))) < 5
    first, second, third = three_halves(words)
    for one, other in ((first, second), (first, third), (second, third)):
        assert abs(_agreement(one, other)) < 5
        assert abs(_agreement(one[:, 1:], other[:, :-1])) < 5


def test_a_word_belongs_to_its_row_and_column():
    np.testing.assert_array_equal(_words()[40:50, :17], _words(rows=10, columns=17, first=40))
