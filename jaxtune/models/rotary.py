"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split form of published checkpoints."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxtune.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each of the ``head_dim / 2`` pairs, in radians, as float32 of shape ``[head_dim / 2]``.

    ``llama3`` keeps wavelengths below ``original / high_freq_factor``, divides those above ``original /
    low_freq_factor`` by ``factor``, and blends the two linearly in the number of turns in between (Llama 3.1).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0).astype(np.float32)
        return ((1 - keep) * frequencies / np.float32(rope.factor) + keep * frequencies).astype(np.float32)
    return frequencies


def rotary_table(positions: Int32[Array, "b s"], rope: RopeConfig, head_dim: int) -> Float[Array, "2 b s half"]:
    """Cosines and sines of all angles, stacked, float32; one table serves all layers and is made outside the scan."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(rope, head_dim)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(
    x: Float[Array, "b s h d"], table: Float[Array, "2 b s half"], scale: float = 1.0
) -> Float[Array, "b s h d"]:
    """Turn each head's pairs (i, i + d/2) by their angles and multiply by ``scale``; float32 inside, x's dtype out."""
    cos, sin = table[0, :, :, None], table[1, :, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (turned * scale if scale != 1.0 else turned).astype(x.dtype)
