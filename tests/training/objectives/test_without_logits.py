"""The objective against losses made from all logits, through the model, adapters and the whole step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.training_sections import TrainConfig
from jaxtune.models import DecoderConfig, random_model
from jaxtune.training import Trainer
from jaxtune.training.objectives import Forward, Terms, cross_entropy
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule

VALUES = {"train.label_smoothing": 0.1, "train.z_loss": 0.01}


def config(vocabulary=37, **fields):
    return DecoderConfig(
        "llama", vocabulary, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, initializer_range=0.3,
        **fields,
    )  # fmt: skip


def by_logits(model, batch, hyperparameters):
    """The same losses from the logits of the whole batch."""
    logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    log_total = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    smoothing = hyperparameters["train.label_smoothing"]
    expected = (1.0 - smoothing) * target + smoothing * logits.mean(axis=-1)
    losses = log_total - expected + hyperparameters["train.z_loss"] * jnp.square(log_total)
    return Terms(losses, batch["weights"])


def made_batch(rows=4, length=12, vocabulary=37, seed=0):
    generator = np.random.default_rng(seed)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
        "tokens": generator.integers(0, vocabulary, (rows, length)).astype(np.int32),
        "targets": generator.integers(0, vocabulary, (rows, length)).astype(np.int32),
        "positions": positions,
        "segment_ids": np.ones((rows, length), np.int32),
        "example_ids": np.repeat(np.arange(rows, dtype=np.int32)[:, None], length, axis=1),
        "weights": (generator.random((rows, length)) * (generator.random((rows, length)) < 0.5)).astype(np.float32),
    }


def trainers(model_config, rules, mesh=None, batch=4, length=12, **options):
    model = random_model(model_config, jax.random.key(0), mesh=mesh)
    train = TrainConfig(steps=4, batch_size=batch, sequence_length=length)
    return [
        Trainer(model, UpdatePlan(rules), train, objective=objective, **options)
        for objective in (cross_entropy, by_logits)
    ]


CASES = {
    "adapters below a frozen head": ({}, [LowRankRule(match="layers.*.mlp.*", rank=3)]),
    "an adapter of the head, with dropout": ({}, [LowRankRule(match="{lm_head,layers.*.mlp.up}", rank=3, dropout=0.3)]),
    "the head itself": ({}, [FullRule(match="{lm_head,layers.*.mlp.up}.kernel")]),
    "a tied table and a soft cap": ({"tie_embeddings": True, "final_soft_cap": 3.0}, [FullRule(match="embed")]),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_those_from_logits(case):
    fields, rules = CASES[case]
    after = []
    for trainer in trainers(config(**fields), rules):
        state = trainer.init(VALUES)
        # B starts at zero: a second step sees an adapter that does something.
        for seed in range(2):
            state, metrics = trainer.step(state, made_batch(seed=seed), VALUES)
        after.append((state.trainable, metrics))
    for ours, theirs in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("case", ["an adapter of the head, with dropout", "a tied table and a soft cap"])
def test_steps_on_eight_devices_equal_those_from_logits(case, mesh):
    fields, rules = CASES[case]
    after = []
    for trainer in trainers(config(vocabulary=38, **fields), rules, mesh):
        state, metrics = trainer.step(trainer.init(VALUES), made_batch(), VALUES)
        after.append((state.trainable, metrics))
    for ours, theirs in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


def test_a_population_in_one_program_trains_as_its_trials_alone():
    trainer, _ = trainers(config(), [LowRankRule(match="{lm_head,layers.*.mlp.up}", rank=3)])
    values = [{**trainer.hyperparameters, **VALUES, "train.label_smoothing": each} for each in (0.0, 0.2)]
    batch = {name: jnp.asarray(array) for name, array in made_batch().items()}
    states = [trainer.init(seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    hyperparameters = {name: jnp.float32([each[name] for each in values]) for name in values[0]}
    step = jax.jit(jax.vmap(trainer.step_function, in_axes=(None, 0, None, 0)))
    together, _ = step(trainer.params, stacked, batch, hyperparameters)
    for trial, (state, own) in enumerate(zip(states, values, strict=True)):
        alone, _ = trainer.step(state, batch, own)
        for ours, theirs in zip(*(jax.tree.leaves(each.trainable) for each in (together, alone)), strict=True):
            np.testing.assert_allclose(ours[trial], theirs, rtol=2e-4, atol=2e-6)


def test_a_step_holds_no_logits():
    vocabulary, rows, length = 16384, 8, 128
    both = trainers(config(vocabulary), CASES["adapters below a frozen head"][1], batch=rows, length=length)
    batch = made_batch(rows, length, vocabulary)
    ours, theirs = (trainer.compile_step(batch).memory_analysis().temp_size_in_bytes for trainer in both)
    logits = rows * length * vocabulary * 4
    print(f"temporaries: {ours / 2**20:.1f} MiB, with logits {theirs / 2**20:.1f} MiB")
    assert theirs > logits
    assert ours < logits / 3


def test_the_bound_model_is_what_an_objective_is_promised():
    seen = []

    def objective(model, batch, hyperparameters):
        seen.append(isinstance(model, Forward))
        states = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        return Terms(jnp.abs(model.head.logits(states) - logits).sum(axis=-1), batch["weights"])

    trainer = Trainer(
        random_model(config(), jax.random.key(0)),
        UpdatePlan(CASES["adapters below a frozen head"][1]),
        TrainConfig(steps=1, batch_size=4, sequence_length=12),
        objective=objective,
    )
    losses = trainer.program.terms(
        trainer.params, trainer.init().trainable, trainer.place(made_batch()), trainer.hyperparameters
    ).losses
    assert seen == [True]
    np.testing.assert_allclose(losses, 0.0, atol=1e-4)
