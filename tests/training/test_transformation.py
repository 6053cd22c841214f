"""Optax transformations and schedules of one's own, against optax by itself and the project's own AdamW."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.errors import UserError
from jaxtune.models import split
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.objectives import Terms
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.optimizers.schedule_free import ScheduleFreeConfig
from jaxtune.training.population import Population
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule
from tests.training.tiny_trainer import ROWS, tiny_model, tiny_trainer

ADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
CONFIG = OptimizerConfig(
    learning_rate=0.03, schedule="constant", warmup=0.0, beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.1
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def quadratic(model, batch, hyperparameters):
    """Of all that is trained, curved and pulled as the batch says; a forward pass would take long to compile."""
    arrays = [array for adapter in model.adapters.values() for array in (adapter.a, adapter.b)]
    arrays += [array for name, array in split(model.decoder)[1].items() if "mlp" in name]
    curvatures = [jnp.sin(1.0 + jnp.arange(array.size)).reshape(array.shape) for array in arrays]
    gaps = [jnp.square(array - batch["pull"][0]) for array in arrays]
    losses = [jnp.sum(curvature * gap) for curvature, gap in zip(curvatures, gaps, strict=True)]
    return Terms(jnp.stack(losses), 1.0)


def made(seed):
    return {"pull": np.random.default_rng(seed).standard_normal(ROWS).astype(np.float32)}


def trainer_of(*arguments, **options):
    return tiny_trainer(*arguments, objective=quadratic, **options)


def steps(trainer, count=3):
    state, told = trainer.init(), []
    for seed in range(count):
        state, metrics = trainer.step(state, made(seed))
        told.append(metrics)
    return state, told


def assert_close(one, other, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), one, other)


def test_adamw_of_optax_is_the_project_s_with_its_rules(model):
    """Factors of the rules, clipping, decay; and layers of no rule stay where they are, though optax decays them."""
    transformation = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.03, **ADAM))
    trainer = trainer_of(model, transformation)
    start = jax.tree.map(np.array, trainer.init().trainable)
    ours, told = steps(trainer_of(model, CONFIG))
    theirs, others = steps(trainer)
    query = "layers.attention.q"
    # One rule for layer 1 alone: of the array's two layers the first has none.
    np.testing.assert_array_equal(theirs.trainable["low_rank"][query]["a"][0], start["low_rank"][query]["a"][0])
    assert_close(theirs.trainable["low_rank"], ours.trainable["low_rank"], rtol=2e-4, atol=1e-6)
    # The rule without a rate of its own, and the one whose factor is 0.
    assert_close(theirs.trainable["full"], ours.trainable["full"], rtol=2e-4, atol=1e-6)
    for one, other in zip(told, others, strict=True):
        assert_close(
            {name: one[name] for name in ("loss", "grad_norm")}, {n: other[n] for n in ("loss", "grad_norm")}, rtol=1e-4
        )
        assert "learning_rate" in one
        assert "learning_rate" not in other
    assert not any(name.startswith("optimizer.") for name in trainer.hyperparameters)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: not a hyperparameter of this run"):
        trainer.step(trainer.init(), made(0), {"optimizer.learning_rate": 1.0})


def test_a_schedule_of_one_s_own_is_a_factor_on_the_rate(model):
    factors = jnp.array([0.5, 0.25, 2.0])
    trainer = trainer_of(model, CONFIG, schedule=lambda step: factors[step])
    _, told = steps(trainer)
    assert [float(each["learning_rate"]) for each in told] == pytest.approx([0.015, 0.0075, 0.06])
    assert trainer.hyperparameters.keys() >= {"optimizer.learning_rate", "optimizer.beta1"}
    assert not trainer.hyperparameters.keys() & {"optimizer.warmup", "optimizer.final_scale"}
    _, metrics = trainer.step(trainer.init(), made(0), {"optimizer.learning_rate": 1.0})
    assert float(metrics["learning_rate"]) == 0.5
    assert trainer.traces["step"] == 1
    # With an optax transformation, on what it adds; gradient descent is told by hand.
    plain, scheduled = (trainer_of(model, optax.sgd(0.1), **options) for options in ({}, {"schedule": lambda _: 0.5}))
    start = jax.tree.map(np.array, plain.init().trainable)
    moved = [jax.tree.map(np.subtract, steps(each, 1)[0].trainable, start) for each in (plain, scheduled)]
    assert_close(jax.tree.map(lambda leaf: 0.5 * leaf, moved[0]), moved[1], rtol=1e-5, atol=1e-7)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved[0])) > 1e-3


def test_states_of_transformations_lie_as_what_they_stand_for_and_are_saved(mesh, tmp_path):
    """Over eight devices: part of the parameters masked, a factored state, one that asks for the loss."""
    rules = [LowRankRule(match="layers.*.mlp.up", rank=4), FullRule(match="layers.*.mlp.down")]
    transformation = optax.chain(
        optax.masked(optax.scale_by_adam(), {"low_rank": True, "full": False}),
        optax.scale_by_factored_rms(min_dim_size_to_factor=4),
        optax.contrib.reduce_on_plateau(),
        optax.scale(-1e-3),
    )
    trainer = trainer_of(tiny_model(mesh), transformation, rules=rules)
    state = trainer.init()
    adam = state.moments[0].inner_state
    for moments in (adam.mu, adam.nu):
        for part, array in moments["low_rank"]["layers.mlp.up"].items():
            assert array.sharding == state.trainable["low_rank"]["layers.mlp.up"][part].sharding
    assert not adam.mu["low_rank"]["layers.mlp.up"]["b"].sharding.is_fully_replicated
    with Opened(tmp_path) as checkpoints:
        result = trainer.fit([made(0)], until=2, checkpoints=checkpoints)
        gone_on = trainer.fit([made(0)], until=3, checkpoints=checkpoints)
    assert gone_on.steps_run == 1
    whole = trainer.fit([made(0)], until=3)
    assert_close(gone_on.state, whole.state, rtol=0)
    assert np.isfinite(result.metrics["loss"])


def test_schedule_free_learns_beside_the_mean_that_is_evaluated_and_saved(model):
    config = ScheduleFreeConfig(learning_rate=0.03, warmup=0.0, beta1=0.8)
    trainer = trainer_of(model, config)
    state, _ = steps(trainer, 2)
    values = trainer.traced_values()
    aside = trainer.program.optimizer.point(state.trainable, state.moments, values)
    batch = made(7)
    losses = [
        trainer.evaluate(dataclasses.replace(state, trainable=trainable), [batch]).loss
        for trainable in (state.trainable, aside)
    ]
    _, metrics = trainer.step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


class Opened:
    def __init__(self, folder):
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def __enter__(self):
        return self.checkpoints

    def __exit__(self, *_):
        self.checkpoints.close()


def test_a_population_trains_with_it(model):
    trainer = trainer_of(model, optax.adam(1e-2))
    population = Population(trainer, 2, batched=True)
    for slot in range(2):
        population.put(slot, trainer.init(seed=slot))
    population.step({0: made(0), 1: made(1)})
    alone, _ = trainer.step(trainer.init(seed=1), made(1))
    assert_close(population.take(1).trainable, alone.trainable, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_is_told(model):
    with pytest.raises(UserError, match=r"update\.0\.weight_decay: does nothing with an optax transformation"):
        trainer_of(model, optax.sgd(1.0), rules=[FullRule(match="final_norm", weight_decay=0.1)])
    for schedule, message in (
        (lambda: 1.0, "schedule: a function of the step that returns one number is needed"),
        (lambda step: jnp.ones(3), r"schedule: the function returned an array of the shape \(3,\)"),
        (lambda step: None, "schedule: a function of the step that returns one number"),
    ):
        trainer = trainer_of(model, schedule=schedule)
        state = trainer.init()
        with pytest.raises(UserError, match=message):
            trainer.step(state, made(0))
    searching = trainer_of(model, optax.lbfgs())
    with pytest.raises(
        UserError, match="optimizer: this optax transformation asks for grad, value_fn, as line searches"
    ):
        searching.step(searching.init(), made(0))
