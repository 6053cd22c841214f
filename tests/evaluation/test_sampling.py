from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.evaluation.sampling import Sampling, filtered, sample


def settings(temperature=1.0, top_k=0, top_p=1.0):
    return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p), np.uint32(0))


def kept(logits, **changes):
    """The set of tokens that may be drawn, per row."""
    ranked, order = filtered(jnp.asarray(logits, jnp.float32), settings(**changes))
    return [
        set(tokens[np.isfinite(row)].tolist()) for row, tokens in zip(*map(np.asarray, (ranked, order)), strict=True)
    ]


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = np.log([[0.1, 0.4, 0.2, 0.3]])
    assert kept(logits, top_p=0.39) == [{1}]
    assert kept(logits, top_p=0.41) == [{1, 3}]
    assert kept(logits, top_p=0.71) == [{1, 3, 2}]
    assert kept(logits, top_p=1.0) == [{0, 1, 2, 3}]


def test_top_p_counts_what_top_k_left():
    logits = np.log([[0.1, 0.4, 0.2, 0.3]])
    assert kept(logits, top_k=2) == [{1, 3}]
    assert kept(logits, top_k=2, top_p=0.55) == [{1}]  # 0.4 / 0.7 = 0.57 reaches it


def test_filters_equal_transformers():
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(scale=3, size=(6, 40)).astype(np.float32)
    for temperature, top_k, top_p in [(0.7, 5, 1.0), (1.3, 0, 0.9), (2.0, 12, 0.6), (1.0, 3, 0.95)]:
        scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores)
        expected = [set(np.flatnonzero(row)) for row in torch.isfinite(scores).numpy()]
        assert kept(logits, temperature=temperature, top_k=top_k, top_p=top_p) == expected


def test_draws_follow_the_filtered_distribution():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    tokens = sample(jnp.broadcast_to(logits, (count, 4)), settings(temperature=0.5, top_k=3), keys)
    shares = np.bincount(np.asarray(tokens), minlength=4) / count
    expected = np.array([0.0, 0.16, 0.04, 0.09]) / 0.29
    np.testing.assert_allclose(shares, expected, atol=0.012)
    assert shares[0] == 0.0
