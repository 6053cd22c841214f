from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.evaluation.loss import LossTotals, evaluate_loss, token_losses


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_token_losses_equal_float64(batch, length, vocab, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=8, size=(batch, length, vocab)).astype(np.float32)
    targets = rng.integers(vocab, size=(batch, length)).astype(np.int32)
    exact = logits.astype(np.float64)
    exact = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    losses = token_losses(jnp.asarray(logits), jnp.asarray(targets))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, exact, rtol=1e-5, atol=1e-5)


def test_token_losses_of_bfloat16_and_huge_logits():
    logits = jnp.asarray([[3e4, 0.0, -3e4]], jnp.bfloat16)
    losses = token_losses(jnp.broadcast_to(logits, (3, 3)), jnp.arange(3))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, [0.0, float(logits[0, 0]), 2 * float(logits[0, 0])])


def test_token_losses_keep_no_second_array_of_logits():
    shape = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
    targets = jax.ShapeDtypeStruct((64,), jnp.int32)
    memory = jax.jit(token_losses).lower(shape, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 4096 * 4 / 8


def batch(losses, weights, ids):
    losses, weights = np.asarray(losses, np.float32), np.asarray(weights, np.float32)
    return {"losses": losses * weights, "weights": weights, "example_ids": np.asarray(ids, np.int32)}


def test_loss_and_error_by_hand():
    """Two rows: examples 7 and 8 packed, then 9 and padding whose garbage must not count."""
    batches = [
        batch([[9.0, 1.0, 3.0, 2.0]], [[0.0, 1.0, 1.0, 0.5]], [[7, 7, 7, 8]]),
        batch([[4.0, 6.0, 5.0, np.float32(3)]], [[1.0, 1.0, 1.0, 1.0]], [[9, 9, -1, -1]]),
    ]
    result = evaluate_loss(lambda one: jnp.asarray(one["losses"]), batches)
    assert result.example_ids.tolist() == [7, 8, 9]
    assert result.example_sums.tolist() == [4.0, 1.0, 10.0]
    assert result.example_weights.tolist() == [2.0, 0.5, 2.0]
    assert result.tokens == 4.5
    assert result.loss == pytest.approx(15 / 4.5)
    mean = 15 / 4.5
    residuals = np.array([4 - 2 * mean, 1 - 0.5 * mean, 10 - 2 * mean])
    assert result.standard_error == pytest.approx(np.sqrt(3 / 2 * (residuals**2).sum()) / 4.5)


def test_packing_does_not_change_the_result():
    rng = np.random.default_rng(0)
    lengths = [3, 5, 2, 6, 4]
    rows = [(i, rng.uniform(0, 4, n).astype(np.float32), rng.uniform(0, 1, n)) for i, n in enumerate(lengths)]
    padded, packed = LossTotals(), LossTotals()
    for i, losses, weights in rows:
        one = batch(
            [np.pad(losses, (0, 8 - len(losses)))],
            [np.pad(weights, (0, 8 - len(losses)))],
            [[i] * len(losses) + [-1] * (8 - len(losses))],
        )
        padded.add(one["losses"], one["weights"], one["example_ids"])
    whole = batch(
        [np.concatenate([losses for _, losses, _ in rows])],
        [np.concatenate([weights for *_, weights in rows])],
        [np.repeat(np.arange(len(lengths)), lengths)],
    )
    packed.add(whole["losses"], whole["weights"], whole["example_ids"])
    one, other = padded.result(), packed.result()
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.standard_error == pytest.approx(other.standard_error, rel=1e-5)


def test_an_example_split_over_batches_is_one_observation():
    result = evaluate_loss(
        lambda one: one["losses"],
        [batch([[1.0, 2.0]], [[1.0, 1.0]], [[0, 0]]), batch([[3.0, 2.0]], [[1.0, 1.0]], [[0, 1]])],
    )
    assert result.example_sums.tolist() == [6.0, 2.0]


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="no token"):
        evaluate_loss(lambda one: one["losses"], [])
    with pytest.raises(ValueError, match="no token"):
        evaluate_loss(lambda one: one["losses"], [batch([[1.0]], [[0.0]], [[4]])])


def test_a_diverged_model_gives_nan_not_a_number_that_looks_fine():
    result = evaluate_loss(lambda one: one["losses"], [batch([[np.nan, 1.0]], [[1.0, 1.0]], [[0, 1]])])
    assert np.isnan(result.loss)
