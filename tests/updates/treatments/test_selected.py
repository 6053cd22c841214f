"""Methods that train some layers of each stack, and others in the next round."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.training_sections import TrainConfig
from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, random_model
from jaxtune.models.decoder import Detached, split
from jaxtune.training import Trainer
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.population import Population
from jaxtune.updates import UpdatePlan, merge_adapters
from jaxtune.updates.treatments.badam import Badam, BadamRule
from jaxtune.updates.treatments.base import Matched
from jaxtune.updates.treatments.frozen import FrozenRule
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.half import HalfRule, balanced
from jaxtune.updates.treatments.lisa import LisaRule
from jaxtune.updates.treatments.selected import Selected

# No two kernels, and no activations, have one shape.
CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=10, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
ROWS, LENGTH = 8, 6
RATE, DECAY, BETAS, EPSILON = 0.01, 0.1, (0.9, 0.99), 1e-4
RULES = {
    "half": HalfRule(match="**", period=2, share=0.4),
    "lisa": LisaRule(match="**", period=2, layers=2, layer_decay=0.5),
    "badam": BadamRule(match="**", period=2, layers=1, order="descending"),
}
# Fewer modules take less time to compile.
OTHERS = FrozenRule(match="layers.*.{attention.k,attention.v,attention.o,mlp.gate,mlp.up}")


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 48, (ROWS, LENGTH + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((ROWS, LENGTH), np.float32)}


def make_trainer(rule: Any, mesh: Any = None, accumulate: int = 1, optimizer: Any = None, **config: Any) -> Trainer:
    optimizer = optimizer or OptimizerConfig(
        learning_rate=RATE,
        weight_decay=DECAY,
        beta2=BETAS[1],
        epsilon=EPSILON,
        clip_norm=1e9,
        schedule="constant",
        warmup=0.0,
    )
    train = TrainConfig(steps=8, batch_size=ROWS, sequence_length=LENGTH, accumulate=accumulate)
    model = random_model(dataclasses.replace(CONFIG, **config), jax.random.key(0), mesh=mesh)
    return Trainer(model, UpdatePlan([OTHERS, rule]), train, optimizer)


def weights(trainer: Trainer, state: Any) -> dict[str, np.ndarray]:
    """The model with what was trained in it."""
    held = {path: np.array(array) for path, array in {**trainer.params, **trainer._owned}.items()}
    held |= {path: np.asarray(array) for path, array in state.trainable["full"].items()}
    for part in trainer.plan.parts:
        for path in part.owns:
            kept = state.fixed[part.store][part.path]
            held[path] = np.array(kept["stack"])
            held[path][np.asarray(kept["layers"])] = state.trainable[part.store][part.path]
    return held


def chosen(trainer: Trainer, state: Any) -> dict[str, list[int]]:
    """Which layers of each stack are trained; not those without layers."""
    store = trainer.plan.rules[1].method
    parts = {part.path: part for part in trainer.plan.parts if part.store == store}
    return {
        next(iter(parts[path].owns)): sorted(np.asarray(kept["layers"]).tolist())
        for path, kept in state.fixed[store].items()
    }


EVERY = ["half", "lisa", pytest.param("badam", marks=pytest.mark.slow)]
# The mechanism is one.
ONE = pytest.mark.parametrize("trainer", ["half"], indirect=True)


@pytest.fixture(scope="module", params=EVERY)
def trainer(request) -> Trainer:
    return make_trainer(RULES[request.param])


@pytest.fixture(scope="module")
def gradients() -> Any:
    """Of the mean loss, by plain autodiff of a model without adapters."""
    detached, _ = Detached.of(random_model(CONFIG, jax.random.key(0)))

    @jax.jit
    def gradient(params: Any, tokens: Any, targets: Any) -> Any:
        def loss(params: Any) -> Any:
            logs = jax.nn.log_softmax(detached.merged(params)(tokens))
            return -jnp.mean(jnp.take_along_axis(logs, targets[..., None], -1))

        return jax.grad(loss)(params)

    return gradient


def test_a_run_is_adamw_of_the_layers_of_each_round_in_float64(trainer, gradients):
    state = trainer.init()
    model = {path: value.astype(np.float64) for path, value in weights(trainer, state).items()}
    moments: dict[tuple[str, int | None], list[Any]] = {}
    before: dict[str, list[int]] = {}
    after, rounds = weights(trainer, state), set[str]()
    for step in range(7):
        trained = [leaf.size for leaf in jax.tree.leaves(state.trainable)]
        held = [leaf.nbytes for leaf in jax.tree.leaves(state.moments) if leaf.dtype == jnp.float32]
        assert sum(held) == 8 * sum(trained)
        point = {path: np.asarray(value, np.float32) for path, value in model.items()}
        slopes = gradients(point, batch(step)["tokens"], batch(step)["targets"])
        last = after
        state, _ = trainer.step(state, batch(step))
        after, now = weights(trainer, state), chosen(trainer, state)
        rounds.add(str(now))
        for path, value in model.items():
            if not path.startswith("layers."):
                places: list[Any] = [None] if path in state.trainable["full"] else []
            else:
                places = now.get(path, [])
                assert before == {} or step % 2 == 0 or now == before
                for layer in set(range(len(value))) - set(places):
                    np.testing.assert_array_equal(after[path][layer], last[path][layer])
            for layer in places:
                at = ... if layer is None else layer
                if (path, layer) not in moments:
                    moments[path, layer] = [0, 0.0, 0.0]
                m = moments[path, layer]
                slope = np.asarray(slopes[path], np.float64)[at]
                m[0] += 1
                m[1] = BETAS[0] * m[1] + (1 - BETAS[0]) * slope
                m[2] = BETAS[1] * m[2] + (1 - BETAS[1]) * slope**2
                first, second = (value / (1 - beta ** m[0]) for value, beta in zip(m[1:], BETAS, strict=True))
                decay = trainer.plan.rules[1].layer_decay or 1.0
                above = CONFIG.num_layers - 1 - layer if layer is not None else 4 * (path == "embed.table")
                model[path][at] -= RATE * decay**above * (first / (np.sqrt(second) + EPSILON) + DECAY * model[path][at])
            np.testing.assert_allclose(after[path], model[path], rtol=1e-3, atol=2e-4, err_msg=path)
        # What leaves loses its moments.
        if (step + 1) % 2 == 0:
            coming = trainer.plan.drawn(int(state.seed), step + 1, trainer.hyperparameters)
            store = trainer.plan.rules[1].method
            for part in trainer.plan.parts:
                if part.store == store:
                    (path,) = part.owns
                    stays = set(coming[store][part.path]["layers"].tolist())
                    assert isinstance(part, Selected)
                    gone = range(CONFIG.num_layers) if part.forgets else set(now[path]) - stays
                    for layer in gone:
                        moments.pop((path, layer), None)
        before = now
    assert len(rounds) > 1
    model_after = merge_adapters(
        random_model(CONFIG, jax.random.key(0)), trainer.plan, state.trainable, trainer.hyperparameters, state.fixed
    )
    for path, array in split(model_after)[1].items():
        np.testing.assert_array_equal(array, after[path])
    assert trainer.traces == {"step": 1, "redraw": 1}


def computations(text: str) -> Iterator[tuple[str, str]]:
    yield from re.findall(r"^((?:ENTRY )?%\S+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)


@ONE
def test_a_layer_that_is_not_trained_makes_no_gradient_of_its_weights(trainer):
    text = trainer.compile_step(batch()).as_text() or ""
    bodies = {name.removeprefix("ENTRY ").lstrip("%"): body for name, body in computations(text)}
    (entry,) = re.findall(r"^ENTRY %(\S+) ", text, re.MULTILINE)
    always, new = {entry}, {entry}
    while new:  # all that is called, but for branches
        lines = [re.sub(r"branch_computations=\{[^}]*\}", "", bodies[name]) for name in new]
        new = {name for line in lines for name in re.findall(r"%([\w.-]+)", line)} & bodies.keys() - always
        always |= new
    kernels = {"16,20", "24,16"}
    dots = {name: set(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", body)) & kernels for name, body in bodies.items()}
    found = {True: set[str](), False: set[str]()}
    for name, shapes in dots.items():
        found[name in always] |= shapes
    assert found == {True: set(), False: kernels}


@ONE
def test_a_run_goes_on_as_if_it_had_not_stopped(trainer, tmp_path):
    state = trainer.init()
    for step in range(2):
        state, _ = trainer.step(state, batch(step))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state)
    checkpoints.wait()
    again, _ = checkpoints.restore(2, trainer.init(seed=3))
    for step in range(2, 5):  # over the end of a round
        state, again = (trainer.step(each, batch(step))[0] for each in (state, again))
    jax.tree.map(np.testing.assert_array_equal, state, again)


@ONE
@pytest.mark.slow
def test_slots_draw_for_themselves(trainer):
    population, values = Population(trainer, 2, batched=True), [{}, {"update.1.period": 1.0}]
    for slot in range(2):
        population.put(slot, trainer.init(values[slot], seed=slot), values[slot])
    for step in range(3):
        population.step({slot: batch(step) for slot in range(2)})
    assert population.traces == 1
    for slot in range(2):
        state = trainer.init(values[slot], seed=slot)
        for step in range(3):
            state, _ = trainer.step(state, batch(step), values[slot])
        ours = population.take(slot)
        assert chosen(trainer, ours) == chosen(trainer, state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours.trainable, state.trainable
        )


@ONE
@pytest.mark.slow
def test_microbatches_and_a_mesh_compute_what_one_device_does(trainer, mesh):
    rule = trainer.plan.rules[1]
    others = make_trainer(rule, accumulate=2), make_trainer(rule, mesh)
    states = [each.init() for each in (trainer, *others)]
    for step in range(3):
        made = [each.step(state, batch(step)) for each, state in zip((trainer, *others), states, strict=True)]
        states = [state for state, _ in made]
        for _, metrics in made[1:]:
            for name in ("loss", "grad_norm"):
                assert float(metrics[name]) == pytest.approx(float(made[0][1][name]), rel=1e-4), name


@given(st.integers(1, 9), st.integers(1, 5), st.data())
@settings(max_examples=50, deadline=None)
def test_rows_and_columns_of_a_draw_have_what_they_should(rows, columns, data):
    count = data.draw(st.integers(1, rows))
    drawn = balanced(np.random.default_rng(data.draw(st.integers(0, 9))), rows, columns, count)
    assert np.all(drawn.sum(axis=0) == count)
    assert drawn.sum(axis=1).max() - drawn.sum(axis=1).min() <= 1


def test_a_balanced_draw_is_as_a_free_one_in_pairs():
    drawn = np.array([balanced(np.random.default_rng(seed), 4, 4, 2) for seed in range(600)])
    both = np.mean(drawn[:, :, 0] & drawn[:, :, 1])
    assert both == pytest.approx(1 / 6, abs=0.02)  # of two in four
    assert np.mean(drawn, axis=0) == pytest.approx(0.5, abs=0.08)


def test_every_layer_has_its_turn():
    array = Matched("layers.mlp.up.kernel", (6, 2, 2), ("layers", None, None), (0, 0, -1, 0, 0, 0))
    orders: list[tuple[Any, list[int] | None]] = [
        ("ascending", [0, 1, 3, 4, 5]),
        ("descending", [5, 4, 3, 1, 0]),
        ("random", None),
    ]
    for order, first in orders:
        (part,) = Badam.treat([array], {0: BadamRule(match="**", order=order, period=3)}, {})
        drawn = [part.draw(7, step, {})["layers"].tolist() for step in range(0, 30, 3)]
        turns = [[layer for layers in part for layer in layers] for part in (drawn[:5], drawn[5:])]
        if first is None:
            assert [sorted(turn) for turn in turns] == [[0, 1, 3, 4, 5]] * 2
            assert turns[0] != turns[1]
        else:
            assert turns == [first] * 2
        assert part.draw(7, 4, {})["layers"].tolist() == drawn[1]
        assert part.draw(7, 4, {"update.0.period": 2.0})["layers"].tolist() == drawn[2]
    (part,) = Badam.treat([array], {0: BadamRule(match="**", order="ascending", layers=2)}, {})
    assert [part.draw(0, step, {})["layers"].tolist() for step in range(0, 200, 50)] == [[0, 1], [3, 4], [0, 5], [0, 1]]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [HalfRule(match="layers.**", share=0.1)],
            r"update\.0\.share: 0\.1 of 4 layers selects nothing; give at least 0\.13",
        ),
        ([LisaRule(match="**", layers=5)], r"update\.0\.layers: 5 at a time of 4 that match; give at most 4"),
        (
            [BadamRule(match="embed")],
            r"update\.0: method badam is for parameters of layers, but 'embed' has only embed",
        ),
        (
            [FullRule(match="layers.0.**"), HalfRule(match="layers.**")],
            r"update\.1: .* has layers of method full \(update\.0\) and of half; a module is treated by one",
        ),
    ],
)
def test_bad_rules_are_told(rules, message):
    with pytest.raises(UserError, match=message):
        UpdatePlan(rules).resolve(CONFIG)


def test_codes_stay_and_optimizers_follow():
    with pytest.raises(UserError, match=r"update\.0: method 'half' trains .* holds as codes that stay frozen"):
        UpdatePlan([HalfRule(match="**")]).resolve(dataclasses.replace(CONFIG, quantization="int8"))
    with pytest.raises(UserError, match=r"update\.1\.period: .* take optimizer\.kind adamw, lion or sgd"):
        make_trainer(HalfRule(match="**", period=2), optimizer=optax.adam(1e-3))
    make_trainer(HalfRule(match="**"), optimizer=optax.adam(1e-3))
