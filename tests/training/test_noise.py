"""Noise on the embeddings (NEFTune): its size, whose it is, and where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.training_sections import TrainConfig
from jaxtune.models import DecoderConfig, random_model
from jaxtune.models.decoder import EmbeddingNoise, segment_lengths
from jaxtune.training import Trainer
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.population import Population
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.low_rank import LowRankRule

CONFIG = DecoderConfig("llama", 48, 16, 24, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
KEY = "train.neftune_alpha"


def make_trainer(alpha: float | None, **train) -> Trainer:
    settings = TrainConfig(steps=4, sequence_length=12, neftune_alpha=alpha, **{"batch_size": 2, **train})
    plan = UpdatePlan([LowRankRule(match="**.q", rank=2)])
    return Trainer(random_model(CONFIG, jax.random.key(0)), plan, settings, OptimizerConfig(learning_rate=1e-2))


def packed(lengths: list[list[int]], ids: list[list[int]]) -> dict[str, np.ndarray]:
    """Rows of documents, each told by its id."""
    batch = {name: np.zeros((len(lengths), 12), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["example_ids"] = np.full((len(lengths), 12), -1, np.int32)
    for row, (sizes, own) in enumerate(zip(lengths, ids, strict=True)):
        at = 0
        for number, (size, example) in enumerate(zip(sizes, own, strict=True)):
            place = np.s_[row, at : at + size]
            batch["tokens"][place] = (7 * example + np.arange(size)) % 48
            batch["targets"][place] = (7 * example + 1 + np.arange(size)) % 48
            batch["segment_ids"][place], batch["positions"][place] = number + 1, np.arange(size)
            batch["example_ids"][place] = example
            at += size
    return {**batch, "weights": (batch["segment_ids"] > 0).astype(np.float32)}


APART = packed([[5], [4], [7], [0]], [[0], [1], [2], [9]])
TOGETHER = packed([[5, 7], [4]], [[0, 2], [1]])


def test_lengths_of_segments():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]], jnp.int32)
    expected = [[3, 3, 3, 1, 2, 2, 2, 2], [8] * 8]
    np.testing.assert_array_equal(segment_lengths(segments), expected)


def test_noise_is_uniform_of_its_size():
    size = jnp.array([[0.5, 2.0, 0.0]])
    rows = jnp.array([[3, 4, 5]], jnp.uint32)
    found = np.asarray(EmbeddingNoise(jnp.uint32(7), size).on(jnp.zeros((1, 3, 20000)), rows), np.float64)[0]
    assert not np.any(found[2])
    for noise, most in ((found[0], 0.5), (found[1], 2.0)):
        assert np.abs(noise).max() <= most
        # Moments of a uniform draw, and independence of the two positions.
        np.testing.assert_allclose([noise.mean() / most, noise.std() / most], [0.0, 3.0**-0.5], atol=0.02)
        np.testing.assert_allclose(np.histogram(noise / most, 8, (-1, 1))[0] / len(noise), 1 / 8, atol=0.01)
    assert abs(np.corrcoef(found[:2])[0, 1]) < 0.03


def test_noise_belongs_to_a_document_s_token(tmp_path):
    one, other = make_trainer(15.0), make_trainer(15.0, batch_size=4, accumulate=2)
    losses = [
        float(trainer.step(trainer.init(), batch)[1]["loss"]) for trainer, batch in ((one, TOGETHER), (other, APART))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain = make_trainer(None)
    assert KEY not in plain.hyperparameters
    assert not plain.program.noise
    without = float(one.step(one.init(), TOGETHER, {KEY: 0.0})[1]["loss"])
    assert abs(losses[0] - without) > 1e-3
    # Another step or seed draws anew, and the same one again the same.
    again, state = one.init(), one.step(one.init(), TOGETHER, {"optimizer.learning_rate": 0.0})[0]
    assert float(one.step(again, TOGETHER)[1]["loss"]) == losses[0]
    assert float(one.step(state, TOGETHER)[1]["loss"]) != losses[0]
    assert float(one.step(one.init(seed=1), TOGETHER)[1]["loss"]) != losses[0]
    # Neither an evaluation nor a model that answers has any.
    evaluated = one.evaluate(one.init(), [TOGETHER]).loss
    assert evaluated == one.evaluate(one.init(), [TOGETHER], {KEY: 0.0}).loss == pytest.approx(without, rel=1e-5)
    assert one.traces["step"] == 1
    population = Population(one, 2, batched=True)
    for slot, alpha in enumerate((15.0, 0.0)):
        population.put(slot, one.init(), {KEY: alpha})
    metrics = population.step(dict.fromkeys(range(2), TOGETHER))
    found = [float(np.asarray(metrics[slot]["loss"])) for slot in range(2)]
    assert found == pytest.approx([losses[0], without], rel=1e-5)
