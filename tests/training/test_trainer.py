"""The trainer by hand: what it compiles, what it donates, what it trains, and its pure step in transformations."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.training_sections import TrainConfig
from jaxtune.errors import UserError
from jaxtune.models import decoder as decoder_module
from jaxtune.models import load_model
from jaxtune.training import Trainer
from jaxtune.training.objectives import Terms
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule
from tests.training.tiny_trainer import ROWS, tiny_model, tiny_trainer

TRAIN = TrainConfig(steps=8, batch_size=4, sequence_length=12)
# Another value for each traced number; each must make a difference to the training, and none may compile anew.
OTHER = {
    "train.steps": 4.0,
    "train.label_smoothing": 0.3,
    "train.z_loss": 0.1,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 0.5,
    "optimizer.final_scale": 0.5,
    "optimizer.weight_decay": 0.3,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.9,
    "optimizer.epsilon": 1e-2,
    "optimizer.clip_norm": 1e-2,
    "update.0.learning_rate_scale": 0.5,
    "update.0.rank": 2.0,
    "update.0.alpha": 32.0,
    "update.0.dropout": 0.5,
    "update.1.learning_rate_scale": 0.0,
    "update.1.weight_decay": 0.4,
}


@pytest.fixture(scope="module")
def mixed(model):
    """A trainer with low-rank terms, dropout and fully trained parameters."""
    rules = [
        LowRankRule(match="layers.*.attention.{q,v}", rank=4, alpha=8.0, dropout=0.1),
        FullRule(match="layers.1.mlp", weight_decay=0.1),
        FullRule(match="layers.*.mlp_norm"),
    ]
    return Trainer(model, UpdatePlan(rules), TRAIN, OptimizerConfig(learning_rate=1e-2), capacity={"update.0.rank": 6})


def run(trainer, data, steps=3, hyperparameters=None, seed=None):
    state = trainer.init(hyperparameters, seed)
    losses = []
    for _ in range(steps):
        state, metrics = trainer.step(state, next(data), hyperparameters)
        losses.append(metrics["loss"])
    return state, np.array(losses)


def distance(one, other):
    parts = jax.tree.map(lambda a, b: float(np.abs(np.array(a) - np.array(b)).max()), one, other)
    return max(jax.tree.leaves(parts))


def test_every_traced_number_counts_and_none_compiles_anew(mixed, batches):
    # A rule's number may be added to the schema: then this list is to grow.
    assert mixed.hyperparameters.keys() == OTHER.keys() | {"update.2.learning_rate_scale"}
    plain, _ = run(mixed, batches())
    unchanged, _ = run(mixed, batches())
    assert distance(plain.trainable, unchanged.trainable) == 0
    without = {}
    for name, value in OTHER.items():
        changed, _ = run(mixed, batches(), hyperparameters={name: value})
        if not distance(plain.trainable, changed.trainable) > 1e-6:
            without[name] = distance(plain.trainable, changed.trainable)
    assert not without, "these made no difference"
    assert mixed.traces["step"] == 1
    assert mixed._step._cache_size() == 1


def test_the_seed_decides_the_start_and_the_dropout(mixed, batches):
    first, again, other = (run(mixed, batches(), seed=seed)[0] for seed in (1, 1, 2))
    assert distance(first.trainable, again.trainable) == 0
    assert distance(first.trainable, other.trainable) > 1e-3
    assert int(first.seed) != int(other.seed)
    # One state, one batch, another step number: another dropout.
    batch, losses = next(batches()), []
    for step in (0, 1):
        state, _ = run(mixed, batches(), steps=2)
        state = type(state)(jnp.int32(step), state.trainable, state.moments, state.seed)
        losses.append(float(mixed.step(state, batch)[1]["loss"]))
    assert losses[0] != losses[1]


def test_the_state_is_donated_and_nothing_else(mixed, batches):
    state, batch = mixed.init(), mixed.place(next(batches()))
    after, _ = mixed.step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.moments)))
    kept = (after, batch, mixed.params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))


def test_after_twenty_steps_what_is_trained_has_moved_and_the_base_has_not(mixed, batches):
    start = jax.tree.map(np.array, mixed.init().trainable)
    base = jax.tree.map(np.array, mixed.params)
    state, losses = run(mixed, batches(), steps=20, hyperparameters={"train.steps": 20.0})
    moved = jax.tree.map(lambda before, after: before != np.array(after), start, state.trainable)
    for path, parts in moved["low_rank"].items():
        # Every element of the active columns, in every layer; the columns above the rank are masked.
        assert parts["a"][..., :4].all(), path
        assert parts["b"][:, :4].all(), path
        assert not parts["a"][..., 4:].any()
        assert not parts["b"][:, 4:].any()
    assert moved["full"].keys() == {f"layers.mlp.{part}.kernel" for part in ("gate", "up", "down")} | {
        "layers.mlp_norm.scale"
    }
    for path, part in moved["full"].items():
        assert part.mean() > 0.99, path
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, mixed.params), base)
    # Applied, only the layers of the rules differ from the base.
    params, adapters = mixed.apply(state)
    assert adapters.keys() == {"layers.attention.q", "layers.attention.v"}
    differ = {path for path in base if not np.array_equal(params[path], base[path])}
    assert differ == moved["full"].keys()
    np.testing.assert_array_equal(params["layers.mlp.up.kernel"][0], base["layers.mlp.up.kernel"][0])


def test_rules_have_their_own_rate_and_decay(mixed, batches):
    """With a gradient of zero weight only the decay moves: value · (1 - rate · decay) at each step."""
    batch = {name: array * 0 if name == "weights" else array for name, array in next(batches()).items()}
    start = jax.tree.map(np.array, mixed.init().trainable)
    values = {
        "optimizer.warmup": 0.0,
        "optimizer.weight_decay": 0.5,
        "update.1.learning_rate_scale": 3.0,
        "update.2.learning_rate_scale": 0.0,
    }
    state, metrics = mixed.step(mixed.init(values), batch, values)
    rate = float(metrics["learning_rate"])
    assert rate == pytest.approx(1e-2)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    a = start["low_rank"]["layers.attention.q"]["a"]
    np.testing.assert_allclose(state.trainable["low_rank"]["layers.attention.q"]["a"], a * (1 - rate * 0.5), rtol=1e-6)
    up = start["full"]["layers.mlp.up.kernel"]
    np.testing.assert_allclose(state.trainable["full"]["layers.mlp.up.kernel"], up * (1 - 3 * rate * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(state.trainable["full"]["layers.mlp_norm.scale"], 1.0)


def test_the_pure_step_maps_and_differentiates(trainer, batches):
    batch = {name: jnp.asarray(array) for name, array in next(batches()).items()}
    values = {name: jnp.float32(value) for name, value in trainer.hyperparameters.items()}
    states = [jax.tree.map(jnp.array, trainer.init(seed=seed)) for seed in range(3)]
    states = [trainer.step(state, batch)[0] for state in states]  # B is no longer zero
    rates = jnp.array([1e-3, 1e-2, 3e-2], jnp.float32)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def step(state, rate):
        return trainer.step_function(trainer.params, state, batch, {**values, "optimizer.learning_rate": rate})

    together, metrics = jax.jit(jax.vmap(step))(stacked, rates)
    slopes = jax.jit(jax.grad(lambda rate, state: step(step(state, rate)[0], rate)[1]["loss"]))
    slope = float(slopes(rates[1], states[1]))
    for index, state in enumerate(states):
        alone, alone_metrics = trainer.step(
            jax.tree.map(jnp.array, state), batch, {"optimizer.learning_rate": float(rates[index])}
        )
        np.testing.assert_allclose(metrics["loss"][index], alone_metrics["loss"], rtol=1e-5)
        jax.tree.map(
            lambda many, one, index=index: np.testing.assert_allclose(many[index], one, rtol=1e-4, atol=1e-6),
            together.trainable,
            alone.trainable,
        )

    def after_two(rate):
        state = jax.tree.map(jnp.array, states[1])
        for _ in range(2):
            state, metrics = trainer.step(state, batch, {"optimizer.learning_rate": rate})
        return float(metrics["loss"])

    assert slope == pytest.approx((after_two(0.012) - after_two(0.008)) / 0.004, rel=0.02)


def test_one_loss_per_row(model, batches, validation):
    """An objective of one's own: the mean of a row's losses, rows weighted by their number of answers' tokens."""

    def per_row(model, batch, hyperparameters):
        logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
        counts = batch["weights"].sum(axis=1)
        losses = -(picked * batch["weights"]).sum(axis=1) / jnp.maximum(counts, 1.0)
        return Terms(losses, jnp.sqrt(counts))

    def expected(batch):
        logits = np.asarray(jax.jit(model)(batch["tokens"], batch["positions"], batch["segment_ids"]), np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        picked = np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
        counts = batch["weights"].sum(axis=1)
        losses = -(picked * batch["weights"]).sum(axis=1) / np.maximum(counts, 1)
        return (losses * np.sqrt(counts)).sum(), np.sqrt(counts).sum()

    plan = UpdatePlan([LowRankRule(match="layers.*.attention.q", rank=2)])
    trainer = Trainer(model, plan, TRAIN, OptimizerConfig(learning_rate=1e-2), objective=per_row)
    batch = next(batches())
    state = trainer.init()
    # Before the first step the model computes what the base computes.
    sums = np.array([expected(each) for each in validation])
    result = trainer.evaluate(state, validation)
    assert result.loss == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), rel=1e-5)
    assert len(result.example_ids) == 12
    state, metrics = trainer.step(state, batch)
    loss, weight = expected(batch)
    assert float(metrics["weight"]) == pytest.approx(weight, rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(loss / weight, rel=1e-5)
    for _ in range(12):
        state, metrics = trainer.step(state, batch)
    assert float(metrics["loss"]) < 0.9 * loss / weight


def test_evaluation_has_no_dropout_smoothing_or_z_loss(mixed, batches, validation):
    state, _ = run(mixed, batches())
    values = {"train.label_smoothing": 0.3, "train.z_loss": 0.1, "update.0.dropout": 0.5}
    result = mixed.evaluate(state, validation, values)
    params, adapters = mixed.apply(state)
    tuned = mixed.program.decoder.merged(params)
    total = weight = 0.0
    for batch in validation:
        logits = np.asarray(
            tuned(batch["tokens"], batch["positions"], batch["segment_ids"], adapters=adapters), np.float64
        )
        shifted = logits - logits.max(-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        picked = np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
        total -= (picked * batch["weights"]).sum()
        weight += batch["weights"].sum()
    assert result.loss == pytest.approx(total / weight, rel=1e-5)
    assert result.tokens == weight
    assert result.standard_error is not None
    assert mixed.traces["evaluate"] == 1


def test_trainables_and_moments_are_float32_over_a_bfloat16_base(tiny_model, batches):
    model = load_model(tiny_model, dtype="bfloat16")
    plan = UpdatePlan([LowRankRule(match="layers.*.attention.q", rank=2), FullRule(match="layers.*.mlp.up")])
    trainer = Trainer(model, plan, TRAIN)
    values = {name: jnp.float32(value) for name, value in trainer.hyperparameters.items()}
    before = trainer.abstract_state()
    after, metrics = jax.eval_shape(trainer.step_function, trainer.params, before, next(batches()), values)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.params)} == {jnp.dtype("bfloat16")}
    for state in (before, after):
        # Beside the moments there are the numbers of updates, one for each layer.
        moments = [leaf for leaf in jax.tree.leaves(state.moments) if leaf.ndim > 1]
        assert len(moments) == 2 * len(jax.tree.leaves(state.trainable))
        assert {leaf.dtype for leaf in jax.tree.leaves((state.trainable, moments))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
    assert before.trainable["full"]["layers.mlp.up.kernel"].shape == (2, 32, 48)


def test_wrong_names_and_values_are_told(trainer, batches):
    with pytest.raises(UserError, match=r"optimizer\.learning_rat: .*did you mean 'optimizer\.learning_rate'"):
        trainer.init({"optimizer.learning_rat": 1.0})
    batch = next(batches())
    with pytest.raises(UserError, match=r"train\.batch_size: not a hyperparameter"):
        trainer.step(trainer.init(), batch, {"train.batch_size": 8.0})
    with pytest.raises(UserError, match=r"update\.0\.rank: 5 is not between 1 and the capacity 4"):
        trainer.step(trainer.init(), batch, {"update.0.rank": 5.0})
    with pytest.raises(ValueError, match="compiled without dropout"):
        trainer.step(trainer.init(), batch, {"update.0.dropout": 0.1})


def test_a_trainer_that_cannot_be(model, tiny_model, mesh):
    plan = UpdatePlan([LowRankRule(match="layers.*.attention.q", rank=2)])
    with pytest.raises(UserError, match=r"train\.steps"):
        Trainer(model, plan, TrainConfig(epochs=1.0))
    sharded = load_model(tiny_model, mesh)
    with pytest.raises(UserError, match=r"train\.batch_size: 6 rows .* 4 devices .*; nearest: 4 or 8"):
        Trainer(sharded, plan, TrainConfig(steps=1, batch_size=6))
    with pytest.raises(UserError, match=r"8 rows in 4 microbatches .*; nearest: 16"):
        Trainer(sharded, plan, TrainConfig(steps=1, batch_size=8, accumulate=4))


def test_batches_are_cut_over_the_mesh(tiny_model, mesh, batches):
    plan = UpdatePlan([LowRankRule(match="layers.*.attention.q", rank=2)])
    trainer = Trainer(load_model(tiny_model, mesh, dtype="float32"), plan, TRAIN)
    placed = trainer.place(next(batches()))
    # Four rows over data 2 x fsdp 2; the two devices of a tensor pair hold the same row.
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(1, 12)}
    assert {str(shard.index[0]) for shard in placed["tokens"].addressable_shards} == {
        str(slice(row, row + 1, None)) for row in range(4)
    }
    again = trainer.place(placed)
    assert again["tokens"].sharding == placed["tokens"].sharding


def test_a_step_puts_the_model_together_once_and_never_takes_it_apart(monkeypatch):
    """Whatever is traced around it: shapes of a microbatch first, then the microbatches, forwards and backwards."""
    calls = Counter()

    def counted(name):
        function = getattr(decoder_module, name)

        def count(*arguments):
            calls[name] += 1
            return function(*arguments)

        return count

    trainer = tiny_trainer(tiny_model(), accumulate=2)
    for name in ("split", "merge"):
        monkeypatch.setattr(decoder_module, name, counted(name))
    # Of a length that no other test has, for which the layers are not traced already.
    batch = {name: np.zeros((ROWS, 7), np.int32) for name in ("tokens", "targets")} | {
        "weights": np.ones((ROWS, 7), "f4")
    }
    jax.eval_shape(trainer.step_function, trainer.params, trainer.abstract_state(), batch, trainer.traced_values())
    assert calls == {"merge": 1}
