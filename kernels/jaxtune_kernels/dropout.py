"""Dropout bits as a pure function of (seed, row, column).

A bit does not depend on how rows are batched, packed, tiled or sharded, and every implementation of a kernel draws the
same ones, so dropout never stands in the way of comparing two of them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32


def mix32(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32-bit words in which each input bit flips every output bit with probability near one half.

    This is ``lowbias32`` of Chris Wellons' Hash Prospector (https://github.com/skeeto/hash-prospector), two rounds of
    xor-shift and multiply found by search for the least avalanche bias.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def hash_words(*words: UInt32[Array, "*_"] | int) -> UInt32[Array, "*_"]:
    """One 32-bit hash of a sequence of words, elementwise over arrays that broadcast against each other.

    The order counts: ``hash_words(a, b)`` and ``hash_words(b, a)`` are unrelated. Made for seeds (step, module, layer)
    and for row identities (example, position).
    """
    state = jnp.uint32(0x9E3779B9)
    for word in words:
        # The added constant moves every step off the fixed point of mix32 at zero.
        state = mix32((state ^ jnp.asarray(word, jnp.uint32)) + jnp.uint32(0x9E3779B9))
    return state


def row_keys(seed: UInt32[Array, "*#rows"] | int, rows: UInt32[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    """One word for each row identity, for :func:`keep_bits`."""
    return hash_words(seed, 1, rows)


def column_keys(
    seed: UInt32[Array, "*#seeds"] | int, columns: int, first: UInt32[Array, ""] | int = 0
) -> UInt32[Array, "*#seeds {columns}"]:
    """One word for each of ``columns`` columns from column ``first`` on, for :func:`keep_bits`."""
    index = jnp.arange(columns, dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
    return hash_words(jnp.asarray(seed, jnp.uint32)[..., None], 2, index)


def drop_threshold(rate: Float[Array, "*rates"] | float) -> UInt32[Array, "*rates"]:
    """The word below which a bit pattern means that the entry is dropped."""
    return (jnp.asarray(rate, jnp.float32) * 2.0**32).astype(jnp.uint32)


def keep_bits(row_key: Array, column_key: Array, threshold: Array) -> Bool[Array, "*shape"]:
    """Which entries survive, for the words of their rows and columns, which broadcast against each other.

    Rows and columns are hashed apart and joined by one more hash, so that an entry costs one mix32, and two rows whose
    keys collide with a shift between them do not share a shifted mask, as they would in a counter sequence.
    """
    return mix32(row_key ^ column_key) >= threshold


def keep_mask(
    seed: UInt32[Array, ""] | int, rows: UInt32[Array, "*rows"], columns: int, rate: Float[Array, ""] | float
) -> Bool[Array, "*rows columns"]:
    """Which entries of a ``[*rows, columns]`` array survive dropout.

    Args:
      seed: names the draw; two seeds give independent masks.
      rows: an identity for each row; equal identities give equal rows.
      columns: the number of columns.
      rate: the probability of dropping an entry, in [0, 1); exactly none are dropped at 0.

    Returns:
      True where the entry is kept.
    """
    return keep_bits(row_keys(seed, rows)[..., None], column_keys(seed, columns), drop_threshold(rate))
