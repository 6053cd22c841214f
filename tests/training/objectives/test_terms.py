"""Terms over microbatches, devices and populations, and what is said of an objective that returns none."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import UserError
from jaxtune.models.decoder import Detached
from jaxtune.telemetry.writers import JsonlWriter
from jaxtune.training.batches import completed
from jaxtune.training.bound import BoundModel
from jaxtune.training.objectives import Terms, call
from jaxtune.training.population import Population
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule
from tests.training.tiny_trainer import ROWS, RULES, own_batch, tiny_model, tiny_trainer

HEAD = (FullRule(match="lm_head"),)
DROPS = (*RULES, LowRankRule(match="layers.*.mlp.up", rank=2, dropout=0.5))


def made(seed: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed).standard_normal((ROWS, 6)).astype(np.float32)
    return {**own_batch(seed), "values": values}


def divided(model, batch, hyperparameters):
    """Linear in one trained number. Losses over a fixed length; metrics over tokens, over rows and over no row."""
    losses, weights = batch["values"] * model.head.matrix[0, 0], batch["weights"]
    metrics = {"positive": (batch["values"] > 0, weights), "length": (weights.sum(axis=1), 1.0), "never": (losses, 0.0)}
    return Terms(losses, weights, jnp.full(losses.shape, 0.5), metrics)


def expected(factor, *batches):
    values, weights = (np.concatenate([batch[name] for batch in batches]) for name in ("values", "weights"))
    slope = (values * weights).sum(dtype=np.float64) / (0.5 * values.size)
    positive = np.average(values > 0, weights=weights)
    return {
        "loss": factor * slope,
        "grad_norm": abs(slope),
        "positive": positive,
        "length": weights.sum() / len(values),
    }


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("way", ["whole", "accumulated", "devices", "population"])
def test_sums_are_those_of_one_big_batch(model, mesh, way):
    wanted = expected(float(model.lm_head.kernel[0, 0]), made(0))
    over = tiny_model(mesh) if way == "devices" else model
    trainer = tiny_trainer(over, rules=HEAD, objective=divided, accumulate=4 if way == "accumulated" else 1)
    if way == "population":
        population = Population(trainer, 2, batched=True)
        for slot in range(2):
            population.put(slot, trainer.init())
        found = population.step({0: made(1), 1: made(0)})[1]
    else:
        _, found = trainer.step(trainer.init(), made(0))
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
    assert np.isnan(float(found["never"]))
    assert float(found["weight"]) == made(0)["weights"].sum()


def test_metrics_are_recorded_in_training_and_evaluation(model, tmp_path):
    trainer = tiny_trainer(model, rules=HEAD, objective=divided)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    result = trainer.fit([made(0)], until=1, validation=[made(1), made(2)], writer=writer)
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    wanted = expected(float(trainer.apply(result.state)[0]["lm_head.kernel"][0, 0]), made(1), made(2))
    assert record["positive"] == pytest.approx(expected(1, made(0))["positive"])
    assert record["never"] is None
    for name in ("loss", "positive", "length"):
        assert record[f"validation_{name}"] == pytest.approx(wanted[name], rel=1e-5)


def test_the_reference_is_the_base_whatever_was_trained(model):
    """Low-rank terms and parameters trained themselves, all of them moved, and dropout compiled in."""

    def objective(model, batch, hyperparameters):
        own, reference = (each(batch["tokens"])[:, 0, 0] for each in (model, model.reference))
        assert model.reference.reference is model.reference
        return Terms(own, 1.0, metrics={"reference": (reference, 1.0)})

    batch = own_batch()
    base = np.asarray(model(np.asarray(batch["tokens"], np.int32)))[:, 0, 0].mean()
    trainer = tiny_trainer(model, objective=objective, rules=DROPS)
    state = trainer.init()
    found = trainer.evaluate(state, [batch])
    assert (found.loss, found.metrics["reference"]) == pytest.approx((base, base), rel=1e-5)
    moved = dataclasses.replace(state, trainable=jax.tree.map(lambda leaf: leaf + 0.1, state.trainable))
    found = trainer.evaluate(moved, [batch])
    assert found.metrics["reference"] == pytest.approx(base, rel=1e-5)
    assert found.loss != pytest.approx(base, rel=1e-2)
    # A run that began from an adapter has it in its reference, and not what came of it.
    begun = {"low_rank": jax.tree.map(np.asarray, moved.trainable["low_rank"])}
    program = dataclasses.replace(trainer.program, start=begun)
    adapters = trainer.plan.apply(trainer.params, {"low_rank": moved.trainable["low_rank"]}, {})[1]
    own = np.asarray(model(np.asarray(batch["tokens"], np.int32), adapters=adapters))[:, 0, 0].mean()
    terms = jax.jit(program.terms)(trainer.params, state.trainable, trainer.place(made(0)), trainer.hyperparameters)
    assert float(terms.metrics["reference"][0].mean()) == pytest.approx(own, rel=1e-5)
    assert own != pytest.approx(base, rel=1e-2)
    # In the step, where the model itself drops and is differentiated, the reference is neither.
    seed = jnp.uint32(1)
    dropping = trainer.program.forward(trainer.params, state.trainable, completed(trainer.place(made(0))), {}, seed)
    assert dropping.rows is not None
    assert (dropping.reference.rows, dropping.reference.adapters) == (None, {})


WRONG = {
    "a tuple": (lambda x: (x, x), r"the objective odd returned a tuple of 2; return jaxtune\.Terms"),
    "nothing": (lambda x: None, "the objective odd returned nothing"),
    "weights of rows": (lambda x: Terms(x, x[:, 0]), r"weights have the shape \(4,\), what they weigh has \(4, 6\)"),
    "a metric of the loop": (lambda x: Terms(x, x, metrics={"loss": (x, x)}), "cannot be called 'loss'"),
    "texts": (lambda x: Terms(["a"], x), "losses are a list; an array or a number is needed"),
    "a number of none": (lambda x: Terms(HYPERPARAMETERS["a.c"], x), r"hyperparameters\['a\.c'\].*did you mean 'a\.b'"),
}
HYPERPARAMETERS = {"a.b": 1.0}


@pytest.mark.parametrize("case", WRONG)
def test_what_an_objective_returns_and_asks_for_is_checked(model, case):
    returned, message = WRONG[case]

    def odd(model, batch, hyperparameters):
        return returned(batch["values"])

    with pytest.raises(UserError, match=message):
        call(odd, BoundModel(*Detached.of(model), {}, None, "none", "auto"), made(0), HYPERPARAMETERS)


def test_what_an_objective_reads_of_a_batch_in_vain_is_named(model):
    def pairs(model, batch, hyperparameters):
        return Terms(batch["chosen"] - batch["rejected"], 1.0)

    bound, batch = BoundModel(*Detached.of(model), {}, None, "none", "auto"), {"chosen": np.ones(3, np.float32)}
    with pytest.raises(
        UserError, match=r"the objective pairs reads batch\['rejected'\], which .* lacks; it holds chosen"
    ):
        call(pairs, bound, batch, {})

    def inner(model, batch, hyperparameters):
        return {"a.b": 1}["chosen"]

    # An error of the objective's own stays what it is.
    with pytest.raises(KeyError, match="chosen"):
        call(inner, bound, batch, {})


def test_a_trainer_that_starts_from_an_adapter_has_it_in_the_reference(model):
    def objective(model, batch, hyperparameters):
        return Terms(model(batch["tokens"])[:, 0, 0] - model.reference(batch["tokens"])[:, 0, 0], 1.0)

    plain = tiny_trainer(model, objective=objective, rules=RULES[:1])
    start = jax.tree.map(lambda leaf: leaf + 0.1, plain.init().trainable)
    trainer = tiny_trainer(model, objective=objective, rules=RULES[:1], start=start)
    assert trainer.evaluate(trainer.init(), [own_batch()]).loss == pytest.approx(0.0, abs=1e-6)
    assert abs(plain.evaluate(trainer.init(), [own_batch()]).loss) > 1e-3
