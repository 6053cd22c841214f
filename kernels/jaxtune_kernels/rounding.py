"""Stochastic rounding to bfloat16, whose random bits are a pure function of (seed, draw, row, column).

Rounding to nearest loses every step that is smaller than half a unit in the last place, and a bfloat16 has eight bits:
weights stop moving. Rounded up with the probability of the part cut off, a value is right on average (Gupta et al.,
arXiv:1502.02551, section 3). As for dropout, the bits do not depend on tiles, shards or batches, and every
implementation of a kernel draws the same.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from jaxtune_kernels.dropout import hash_words, mix32


def random_words(
    seed: UInt32[Array, "*#seeds"], rows: UInt32[Array, "*#rows"], columns: UInt32[Array, "*#columns"]
) -> UInt32[Array, "*_"]:
    """32 random bits for each element, over arrays of identities that broadcast against each other.

    Args:
      seed: names the draw.
      rows: an identity for each row, such as ``[r, 1]``.
      columns: an identity for each column, such as ``[1, c]``.
    """
    # An element costs one mix32 and a multiplication. The multiplication keeps two rows whose keys differ by a small
    # number from drawing the same sequence with a shift between them: it does not commute with the exclusive or.
    return mix32(hash_words(seed, rows) ^ (columns * jnp.uint32(0x9E3779B1)))


def three_halves(words: UInt32[Array, "*shape"]) -> tuple[Array, Array, Array]:
    """Three words made of one, whose upper sixteen bits are as good as independent in pairs.

    A hash is most of what rounding costs, and a rounding takes half a word: the upper half, the lower half, and the
    upper half of an odd multiple, which all 32 bits have a part in.
    """
    return words, words << 16, words * jnp.uint32(0xC2B2AE35)


def round_stochastically(x: Float[Array, "*shape"], words: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float32 to bfloat16: up or down with the probabilities that make the expectation ``x``.

    A value that bfloat16 holds stays as it is; infinities and NaN stay what they are.

    Args:
      x: float32.
      words: random; the *upper* sixteen bits are used.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) + (words >> 16)
    rounded = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    # Adding to the bits of a NaN could carry into the sign, or out of the word.
    return jnp.where(jnp.isnan(x), x, rounded).astype(jnp.bfloat16)
