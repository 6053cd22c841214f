"""Rotary embedding against its definition in float64."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.config import RopeConfig
from jaxtune.models.rotary import inverse_frequencies, rotary_table, rotate

LLAMA3 = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=64)


def test_rotation_multiplies_complex_pairs() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 7, 3, 10))
    positions = random.integers(0, 300, (2, 7))
    table = rotary_table(jnp.asarray(positions, jnp.int32), RopeConfig(theta=100.0), 10)
    ours = np.asarray(rotate(jnp.asarray(x, jnp.float32), table, scale=0.3))

    frequencies = 100.0 ** (-2 * np.arange(5) / 10)
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    expected = 0.3 * np.concatenate([turned.real, turned.imag], axis=-1)
    # Angles up to 300 radians in float32: an error of 300 * 2**-24 or so.
    np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_scores_depend_on_distance_alone() -> None:
    random = np.random.default_rng(1)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(query: int, key: int) -> float:
        tables = [rotary_table(jnp.full((1, 1), p, jnp.int32), RopeConfig(), 8) for p in (query, key)]
        return float(jnp.sum(rotate(q, tables[0]) * rotate(k, tables[1])))

    assert score(5, 2) == pytest.approx(score(90, 87), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


def test_linear_scaling_divides_every_frequency() -> None:
    plain = inverse_frequencies(RopeConfig(1e4), 16)
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(1e4, "linear", 4.0), 16), plain / 4, rtol=1e-7)


def test_llama3_scaling_keeps_short_divides_long_and_blends_between() -> None:
    scaled = inverse_frequencies(LLAMA3, 16)
    regimes = set()
    for index, frequency in enumerate(500_000.0 ** (-2 * np.arange(8) / 16)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4:
            regime, expected = "short", frequency
        elif wavelength > 64 / 1:
            regime, expected = "long", frequency / 8
        else:
            blend = (64 / wavelength - 1) / (4 - 1)
            regime, expected = "between", (1 - blend) * frequency / 8 + blend * frequency
        regimes.add(regime)
        assert scaled[index] == pytest.approx(expected, rel=1e-6)
    assert regimes == {"short", "between", "long"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"theta": 0.0}, "theta"),
        ({"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low_freq_factor"),
    ],
)
def test_wrong_values_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)
