from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.evaluation.loss import LossTotals, evaluate_loss
from jaxtune.evaluation.terms import Terms


def batch(losses, weights, ids):
    losses, weights = np.asarray(losses, np.float32), np.asarray(weights, np.float32)
    return {"losses": losses, "weights": weights, "example_ids": np.asarray(ids, np.int32)}


def forward(batch):
    return Terms(jnp.asarray(batch["losses"]), jnp.asarray(batch["weights"]))


def test_loss_and_error_by_hand():
    """Two rows: examples 7 and 8 packed, then 9 and padding whose garbage must not count."""
    batches = [
        batch([[9.0, 1.0, 3.0, 2.0]], [[0.0, 1.0, 1.0, 0.5]], [[7, 7, 7, 8]]),
        batch([[4.0, 6.0, 5.0, np.float32(3)]], [[1.0, 1.0, 1.0, 1.0]], [[9, 9, -1, -1]]),
    ]
    result = evaluate_loss(forward, batches)
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
        padded.add(one["losses"] * one["weights"], one["weights"], one["example_ids"])
    whole = batch(
        [np.concatenate([losses for _, losses, _ in rows])],
        [np.concatenate([weights for *_, weights in rows])],
        [np.repeat(np.arange(len(lengths)), lengths)],
    )
    packed.add(whole["losses"] * whole["weights"], whole["weights"], whole["example_ids"])
    one, other = padded.result(), packed.result()
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.standard_error == pytest.approx(other.standard_error, rel=1e-5)


def test_an_example_split_over_batches_is_one_observation():
    result = evaluate_loss(
        forward,
        [batch([[1.0, 2.0]], [[1.0, 1.0]], [[0, 0]]), batch([[3.0, 2.0]], [[1.0, 1.0]], [[0, 1]])],
    )
    assert result.example_sums.tolist() == [6.0, 2.0]


def test_one_loss_a_row_belongs_to_the_row_s_first_example():
    rows = {"losses": np.array([1.0, 3.0]), "weights": np.array([1.0, 0.5]), "example_ids": np.array([[4, 4], [7, -1]])}
    result = evaluate_loss(forward, [rows])
    assert result.example_ids.tolist() == [4, 7]
    assert result.example_sums.tolist() == [1.0, 1.5]


def test_a_batch_is_launched_before_the_one_before_it_is_read():
    order = []

    class Launched:
        def __init__(self, number):
            self.number = number

        def __array__(self, *_, **__):
            order.append(f"read {self.number}")
            return np.ones((1, 1))

    def launch(batch):
        number = int(batch["example_ids"][0, 0])
        order.append(f"launch {number}")
        return Terms(Launched(number), np.ones((1, 1)))

    evaluate_loss(launch, [{"example_ids": np.array([[n]])} for n in range(3)])
    assert order == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="no token"):
        evaluate_loss(forward, [])
    with pytest.raises(ValueError, match="no token"):
        evaluate_loss(forward, [batch([[1.0]], [[0.0]], [[4]])])


def test_a_diverged_model_gives_nan_not_a_number_that_looks_fine():
    result = evaluate_loss(forward, [batch([[np.nan, 1.0]], [[1.0, 1.0]], [[0, 1]])])
    assert np.isnan(result.loss)


def test_examples_of_batches_that_name_none():
    """Packed by hand, of two lengths; then rows without segments; then one loss a row; then losses of pairs."""
    losses, segments = np.array([[1.0, 2.0, 3.0, 9.0], [4.0, 5.0, 6.0, 7.0]]), np.array([[1, 1, 2, 0], [1, 2, 2, 2]])
    packed = {"losses": losses, "weights": np.ones((2, 4)), "segment_ids": segments}
    short = {"losses": losses[:, :2], "weights": np.ones((2, 2)), "segment_ids": segments[:, :2]}
    result = evaluate_loss(forward, [packed, short])
    assert result.example_sums.tolist() == [3.0, 3.0, 4.0, 18.0, 3.0, 4.0, 5.0]
    bare = {"losses": losses, "weights": np.ones((2, 4))}
    assert evaluate_loss(forward, [bare, bare]).example_sums.tolist() == [15.0, 22.0] * 2
    # The row's padding may stand on the left.
    left = np.array([[0, 1, 1, 1], [0, 0, 1, 1]])
    rows = {"losses": np.array([1.0, 3.0]), "weights": np.ones(2), "segment_ids": left}
    assert evaluate_loss(forward, [rows, rows]).example_sums.tolist() == [1.0, 3.0, 1.0, 3.0]
    pairs = {"losses": np.array([1.0, 3.0, 5.0]), "weights": np.ones(3), "segment_ids": left}
    result = evaluate_loss(forward, [pairs])
    assert (result.loss, len(result.example_ids)) == (3.0, 3)


def test_denominators_and_metrics_are_summed_before_anything_is_divided():
    def terms(batch):
        losses = jnp.asarray(batch["losses"])
        right = (losses < 3, jnp.asarray(batch["weights"]))
        first = jnp.zeros_like(losses).at[:, 0].set(8.0)
        return Terms(losses, batch["weights"], first, {"right": right, "never": (losses, 0.0)})

    batches = [batch([[1.0, 2.0]], [[1.0, 1.0]], [[0, 0]]), batch([[5.0, 6.0]], [[1.0, 3.0]], [[1, 2]])]
    result = evaluate_loss(terms, batches)
    assert (result.loss, result.tokens) == ((1 + 2 + 5 + 18) / 16, 16)
    assert result.metrics["right"] == pytest.approx(2 / 6)
    assert np.isnan(result.metrics["never"])


def test_a_result_is_told_in_one_line():
    result = evaluate_loss(forward, [batch(np.ones((40, 30)), np.ones((40, 30)), np.arange(1200).reshape(40, 30))])
    assert repr(result) == str(result) == "LossResult(loss=1, standard_error=0, tokens=1200, examples=1200)"
