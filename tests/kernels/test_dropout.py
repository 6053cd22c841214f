from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtune_kernels import hash_words, keep_mask
from jaxtune_kernels.dropout import mix32

ROWS, COLUMNS = 512, 384


def _mask(seed=7, rate=0.3, rows=None, columns=COLUMNS) -> np.ndarray:
    rows = jnp.arange(ROWS, dtype=jnp.uint32) if rows is None else rows
    return np.asarray(keep_mask(seed, rows, columns, rate))


def _agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two masks, in units of the deviation that independent bits would give."""
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).mean() / (first.std() * second.std()) * np.sqrt(first.size))


def test_mix32_is_the_published_function():
    # Value of lowbias32(1) worked out in Python integers.
    word = 1
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    word = ((word ^ (word >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    word ^= word >> 16
    assert int(mix32(jnp.uint32(1))) == word


def test_mix32_avalanche():
    words = jax.random.bits(jax.random.key(0), (4096,), jnp.uint32)
    for bit in (0, 1, 15, 16, 30, 31):
        flipped = np.asarray(mix32(words) ^ mix32(words ^ jnp.uint32(1 << bit)))
        share = np.unpackbits(flipped.view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
        assert np.all(np.abs(share - 0.5) < 0.04)  # five deviations of 4,096 fair coins


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_rate(rate):
    mask = _mask(rate=rate)
    deviation = np.sqrt(rate * (1 - rate))
    assert abs((1 - mask.mean()) - rate) < 5 * deviation / np.sqrt(mask.size)
    # Sums of rows and of columns scatter as sums of independent bits do.
    assert 0.8 < mask.sum(axis=1).std() / (deviation * np.sqrt(COLUMNS)) < 1.2
    assert 0.8 < mask.sum(axis=0).std() / (deviation * np.sqrt(ROWS)) < 1.2


def test_rate_zero_keeps_everything_even_when_traced():
    assert _mask(rate=0.0).all()
    rows = jnp.arange(ROWS, dtype=jnp.uint32)
    assert bool(jax.jit(lambda rate: keep_mask(1, rows, COLUMNS, rate))(jnp.float32(0.0)).all())


def test_rows_columns_and_seeds_are_independent():
    mask = _mask()
    for shift in (1, 2, 3, 64):
        assert abs(_agreement(mask[shift:], mask[:-shift])) < 5
        assert abs(_agreement(mask[:, shift:], mask[:, :-shift])) < 5
    for seed in (6, 8, 7 + 2**16, 0):
        assert abs(_agreement(mask, _mask(seed=seed))) < 5
    # Pairs of rows and pairs of columns at once: the parity of four corners.
    corners = mask[1:, 1:] ^ mask[:-1, 1:] ^ mask[1:, :-1] ^ mask[:-1, :-1]
    expected = 0.5 - 0.5 * (1 - 2 * 0.3) ** 4
    assert abs(corners.mean() - expected) < 5 * 0.5 / np.sqrt(corners.size) * 2


def test_a_bit_belongs_to_its_row_and_column_not_to_the_batch():
    rows = hash_words(jnp.arange(6, dtype=jnp.uint32)[:, None], jnp.arange(20, dtype=jnp.uint32))
    whole = _mask(rows=rows)
    assert whole.shape == (6, 20, COLUMNS)
    order = np.random.default_rng(0).permutation(120)
    shuffled = _mask(rows=rows.reshape(-1)[order], columns=COLUMNS // 2)
    np.testing.assert_array_equal(shuffled, whole.reshape(120, -1)[order, : COLUMNS // 2])


def test_hash_words_depends_on_each_word_and_on_their_order():
    values = {int(hash_words(*words)) for words in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**32 - 1,))}
    assert len(values) == 8
