"""SMT: blocks by gradients as NumPy has them, a product and its gradient, and a choice that is made once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.training_sections import TrainConfig
from jaxtune.errors import UserError
from jaxtune.evaluation.terms import Terms
from jaxtune.models import DecoderConfig, random_model
from jaxtune.models.linear import FrozenLayer
from jaxtune.parallel import make_mesh
from jaxtune.training import Trainer
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.population import Population
from jaxtune.updates import UpdatePlan, merge_adapters
from jaxtune.updates.treatments.base import Matched
from jaxtune.updates.treatments.eva import EvaRule
from jaxtune.updates.treatments.smt import Smt, SmtRule

CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
RULES = [
    SmtRule(match="layers.{0,1}.mlp.up", share=0.2, block_size=4, batches=2),
    SmtRule(match="**.up", share=0.1, block_size=4, rho=1.0),
]
UP = "layers.mlp.up"


def batch(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 48, (4, 7)).astype(np.int32)
    weights = (generator.random((4, 6)) < 0.5).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def make_trainer(mesh: Any = None, rules: Any = RULES, **options: Any) -> Trainer:
    train = TrainConfig(steps=4, batch_size=4, sequence_length=6, accumulate=2)
    model = random_model(CONFIG, jax.random.key(0), mesh=mesh)
    return Trainer(model, UpdatePlan(rules), train, OptimizerConfig(learning_rate=1e-2), **options)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer()


def expected(scores: np.ndarray, count: int, most: int) -> set[tuple[int, int]]:
    """Layers and places of the largest scores: taken one after the other, as long as their layer has room."""
    taken: list[tuple[int, int]] = []
    for flat in np.argsort(-scores, axis=None):
        layer, place = divmod(int(flat), scores.shape[1])
        if sum(other == layer for other, _ in taken) < most:
            taken.append((layer, place))
        if len(taken) == count:
            break
    return set(taken)


def test_blocks_of_the_largest_mean_gradients_are_chosen(trainer):
    batches = [batch(0), batch(1)]
    state = trainer.informed(trainer.init(), batches)
    params, decoder = trainer.params, trainer.program.decoder

    @jax.jit
    @jax.grad
    def gradient(kernel: Any, one: Any) -> Any:
        logs = jax.nn.log_softmax(decoder.merged({**params, f"{UP}.kernel": kernel})(one["tokens"]))
        losses = -jnp.take_along_axis(logs, one["targets"][..., None], -1)[..., 0]
        return jnp.sum(losses * one["weights"]) / jnp.sum(one["weights"])

    # Of microbatches, as a step takes them.
    parts = [{name: rows[at::2] for name, rows in one.items()} for one in batches for at in (0, 1)]
    each = [np.abs(np.asarray(gradient(params[f"{UP}.kernel"], one), np.float64)) for one in parts]
    scores = np.mean(each, axis=0).reshape(3, 4, 4, 6, 4).mean(axis=(2, 4)).reshape(3, -1)
    up = state.fixed["smt"][UP]
    found = list(zip(np.asarray(up["layers"]).tolist(), np.asarray(up["places"]).tolist(), strict=True))
    # 0.2 of 48 blocks are 10, at most 10 in a layer; of the last layer's 24 there are two.
    assert set(found[:10]) == expected(scores[:2], 10, 10)
    assert set(found[10:]) == {(2, place) for _, place in expected(scores[2:], 2, 2)}
    assert not np.any(state.trainable["smt"][UP]["d"])


def test_the_product_and_its_gradient():
    kernel = Matched("layers.mlp.up.kernel", (4, 12, 20), ("layers", "embed", "mlp"), (0, 0, -1, 1))
    rules = {0: SmtRule(match="**", share=0.2, block_size=4), 1: SmtRule(match="**", share=0.4, block_size=4)}
    (made,) = Smt.treat([kernel], rules, {})
    assert isinstance(made, Smt)
    generator = np.random.default_rng(0)
    # Layer 1 has the most that it may, layer 0 the rest.
    scores = generator.random((4, 15))
    scores[1] += 1.0
    fixed = made.chosen(scores)
    assert np.bincount(fixed["layers"], minlength=4).tolist() == [0, 6, 0, 6]
    w, x, up = (generator.standard_normal(shape) for shape in [(4, 12, 20), (7, 12), (7, 20)])
    d = generator.standard_normal((12, 4, 4))

    def total(d: Any, x: Any) -> Any:
        adapter = made.apply({}, {"d": d}, {name: jnp.asarray(a) for name, a in fixed.items()}, {}, None).adapters[UP]
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], adapter.scanned()) for i in range(4)]
        outs = [
            one.joined(adapter.unscanned()).product(FrozenLayer(x, jnp.asarray(w[i], jnp.float32)))
            for i, one in enumerate(each)
        ]
        return sum(jnp.sum(out * up) for out in outs), outs

    (_, outs), (of_d, of_x) = jax.value_and_grad(total, (0, 1), has_aux=True)(
        jnp.asarray(d, jnp.float32), jnp.asarray(x, jnp.float32)
    )
    whole, of_blocks = w.copy(), []
    for block, layer, place in zip(d, fixed["layers"], fixed["places"], strict=True):
        rows, columns = (slice(4 * at, 4 * at + 4) for at in divmod(int(place), 5))
        whole[layer, rows, columns] += block
        of_blocks.append(x[:, rows].T @ up[:, columns])
    for layer, out in enumerate(outs):
        np.testing.assert_allclose(out, x @ whole[layer], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_d, np.array(of_blocks), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_x, sum(up @ each.T for each in whole), rtol=1e-4, atol=1e-4)
    assert [each.parameters for each in made.sizes({})] == [6 * 16, 6 * 16]


def test_a_run_chooses_once_and_goes_on_from_its_blocks(trainer, tmp_path):
    data = [batch(seed) for seed in range(3)]
    straight = trainer.fit(data, listener=None).state
    for until in (2, 4):
        result = trainer.fit(data, until=until, checkpoints=Checkpoints(tmp_path), listener=None)
    jax.tree.map(np.testing.assert_array_equal, result.state, straight)
    merged = merge_adapters(
        random_model(CONFIG, jax.random.key(0)),
        trainer.plan,
        straight.trainable,
        trainer.hyperparameters,
        straight.fixed,
    )
    params, adapters = trainer.apply(straight)
    ours = trainer.program.decoder.merged(params)(batch(2)["tokens"], adapters=adapters)
    np.testing.assert_allclose(merged(batch(2)["tokens"]), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_each_slot_has_blocks_of_its_own(trainer):
    population = Population(trainer, 2, batched=True)
    states = [trainer.informed(trainer.init(seed=slot), [batch(slot), batch(slot + 1)]) for slot in range(2)]
    assert any(np.any(a != b) for a, b in zip(*(jax.tree.leaves(one.fixed["smt"]) for one in states), strict=True))
    for slot, state in enumerate(states):
        population.put(slot, state.copy(), {})
    population.step({slot: batch(slot) for slot in range(2)})
    for slot, state in enumerate(states):
        alone, _ = trainer.step(state, batch(slot))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            population.take(slot).trainable,
            alone.trainable,
        )


@pytest.mark.slow
def test_a_mesh_chooses_the_same_blocks_and_inputs_are_seen_beside(trainer):
    # Another module, and a method that asks for inputs, change nothing.
    rules = [
        *RULES,
        SmtRule(match="**.q", share=0.1, block_size=8, batches=1),
        EvaRule(match="**.v", batches=1, rank=2),
    ]
    cut = make_trainer(make_mesh(1, 2, 2, jax.devices()[:4]), rules)
    begun = cut.init()
    one, many = (each.informed(each.init(), [batch(0), batch(1)]) for each in (trainer, cut))
    assert cut.traces["gradients"] == 2  # of both modules, and of the one that asks for two batches
    jax.tree.map(np.testing.assert_array_equal, one.fixed["smt"][UP], many.fixed["smt"][UP])
    path = "layers.attention.v"
    assert np.any(np.asarray(many.trainable["eva"][path]["a"]) != np.asarray(begun.trainable["eva"][path]["a"]))


def scaled(model: Any, batch: Any, hyperparameters: Any) -> Terms:
    """Losses of one's own, of what no default objective has."""
    logits = model(batch["chosen"]) - model.reference(batch["chosen"]) + jnp.arange(48.0)
    return Terms(jax.nn.logsumexp(logits, -1), jnp.ones(logits.shape[:2]))


@pytest.mark.slow
def test_gradients_are_those_of_the_objective():
    own = make_trainer(objective=scaled)
    given = own.place({"chosen": batch(0)["tokens"]})
    found = own._gradients(own.plan.parts, own.params, given, own.traced_values())
    assert found[UP].shape == (3, 24)
    assert np.all(np.asarray(found[UP]) > 0)


def test_bad_input(trainer):
    with pytest.raises(UserError, match=r"method smt chooses blocks by gradients .* no loss counts in them"):
        trainer.informed(trainer.init(), [{**batch(0), "weights": np.zeros((4, 6), np.float32)}])
    for rules, message in [
        ([SmtRule(match="**.up")], r"update\.0\.block_size: 256 is larger than layers\.mlp\.up \(16 x 24\); .* is 8"),
        ([SmtRule(match="**.up", block_size=5)], r"update\.0\.block_size: 5 does not divide .* is 4"),
        (
            [SmtRule(match="**.up", block_size=8, share=0.02)],
            r"update\.0\.share: 0\.02 of the 18 blocks .* least 0\.056",
        ),
        (
            [SmtRule(match="layers.0.**.up", block_size=8, share=0.5), SmtRule(match="**.up", block_size=4)],
            r"update\.1\.block_size: 4 for layers of layers\.mlp\.up, of which update\.0 says 8",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            UpdatePlan(rules).resolve(CONFIG)
