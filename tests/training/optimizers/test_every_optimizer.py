"""What holds for every optimizer of the package, whatever it is; a new one is tested here by its file alone."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.config.optimizer_section import OPTIMIZERS
from jaxtune.models import DecoderConfig
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.state import TrainState
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.full import Full, FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule

CONFIG = DecoderConfig("llama", 20, 16, 24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8)
# Layers of a stack under two rules and none, of which one holds still; a vector, and arrays that no stack holds.
PLAN = UpdatePlan(
    [
        FullRule(match="layers.0.mlp.up", learning_rate_scale=0.5, weight_decay=0.3),
        FullRule(match="layers.2.mlp.up", learning_rate_scale=0.0),
        LowRankRule(match="layers.{0,1}.attention.q", rank=2, learning_rate_scale=2.0),
        FullRule(match="final_norm"),
    ]
).resolve(CONFIG)
# Small numbers that a small model needs to have what they are about; and what an optimizer cannot do without.
SETTINGS = {
    "adafactor": {"factor_from": 4},
    "adamw8bit": {"block": 5, "smallest": 100},
    "galore": {"rank": 3, "period": 2},
    "optax": {"name": "nadamw", "numbers": {"b1": 0.8}},
}
# What the page shows of an optimizer in a file of its own, which nothing of the package knows of.
PAGE = Path(__file__).parents[3] / "docs" / "optimizers.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
sys.modules["documented_sign"] = documented = types.ModuleType("documented_sign")
exec(EXAMPLE, documented.__dict__)
KINDS = [*OPTIMIZERS.builtin, "documented_sign:SignConfig"]


def section(kind, **values):
    return OPTIMIZERS.parse({"kind": kind, "weight_decay": 0.1, **SETTINGS.get(kind, {}), **values})


def values_of(settings, factor=1.0):
    """The traced numbers, all of them others with another factor; a share below 1 stays one."""
    own = hyperparameters(settings, "optimizer.") | hyperparameters(list(PLAN.rules), "update.")
    return {name: jnp.float32(factor * value) for name, value in own.items() if name != "optimizer.period"} | {
        name: jnp.float32(value) for name, value in own.items() if name == "optimizer.period"
    }


def arrays(seed, size=1.0):
    generator = np.random.default_rng(seed)
    params = {part.path: jnp.zeros(part.shape, jnp.float32) for part in PLAN.parts if isinstance(part, Full)}
    shapes = jax.eval_shape(lambda: PLAN.init(jax.random.key(0), params))
    made = jax.tree.map(lambda leaf: (size * generator.standard_normal(leaf.shape)).astype(np.float32), shapes)
    if size != 1.0:
        # Nothing depends on the term of the layer that no rule trains.
        made["low_rank"]["layers.attention.q"] = jax.tree.map(
            lambda array: array * np.array([1, 1, 0], np.float32)[:, None, None], made["low_rank"]["layers.attention.q"]
        )
    return jax.tree.map(jnp.asarray, made)


GRADIENTS = [arrays(1 + number, 0.3) for number in range(3)]


@pytest.fixture(scope="module")
def runs():
    """Of each optimizer: its section, itself, its compiled step, how often that was traced, its states and arrays."""
    made = {}

    def run(kind):
        if kind not in made:
            settings = section(kind)
            optimizer, traces = settings.build(PLAN, "auto"), []

            def step(gradients, moments, trainable, rate, values):
                traces.append(1)
                return optimizer.apply(gradients, moments, trainable, rate, values, jnp.float32(1.0))

            compiled, trainable = jax.jit(step), arrays(0)
            path, values = [(trainable, optimizer.init(trainable))], values_of(settings)
            for gradients in GRADIENTS:
                trainable, moments, norm = compiled(gradients, path[-1][1], trainable, jnp.float32(0.1), values)
                assert float(norm) == pytest.approx(
                    math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradients))), rel=1e-5
                )
                path.append((trainable, moments))
            made[kind] = settings, optimizer, compiled, traces, path
        return made[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_what_rules_train_moves_and_nothing_else(runs, kind):
    *_, path = runs(kind)
    start, end = (jax.tree.map(np.asarray, trainable) for trainable, _ in (path[0], path[-1]))
    moved = jax.tree.map(lambda one, other: np.abs(other - one).reshape(len(one), -1), start, end)
    first, still = moved["full"]["layers.mlp.up.kernel"]
    assert np.all(first > 0)
    assert np.all(still == 0)
    assert np.all(moved["full"]["final_norm.scale"] > 0)
    for part in moved["low_rank"]["layers.attention.q"].values():
        assert np.all(part[2] == 0)
        assert np.all(part[:2] > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_are_the_same_program(runs, kind):
    settings, _, compiled, traces, path = runs(kind)
    other = compiled(GRADIENTS[0], path[0][1], path[0][0], jnp.float32(0.01), values_of(settings, 0.9))
    assert len(traces) == 1
    assert jax.tree.structure(other[1]) == jax.tree.structure(path[0][1])
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (other[0], path[1][0])), strict=True))


def tensors():
    """Shape of every trained tensor, and whether it is a layer of a stack."""
    return [((16, 24), True)] * 2 + [((16,), False)] + [((16, 2), True), ((2, 16), True)] * 2


def expected_bytes(kind, shape, stacked):
    """Of what an optimizer keeps of one tensor for each of its parameters, rows, columns or blocks."""
    size, matrix = math.prod(shape), len(shape) == 2
    match kind:
        case "documented_sign:SignConfig":
            return 0
        case "lion" | "sgd":
            return 4 * size
        case "muon":
            return (4 if matrix and stacked else 8) * size
        case "adafactor":
            return 4 * sum(shape) if matrix and min(shape) >= 4 else 4 * size
        case "galore" if matrix and stacked and min(shape) > 3:
            return 4 * 3 * (min(shape) + 2 * max(shape))
        case "adamw8bit" if matrix and size >= 100:
            return 2 * size + 2 * 4 * shape[0] * math.ceil(shape[1] / 5)
    return 8 * size


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_that_of_trained_tensors_to_the_byte(runs, kind):
    *_, path = runs(kind)
    # Counters, and coefficients that are no larger than a few numbers for each layer, are left out.
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(path[0][1]) if leaf.size > 9)
    assert held == sum(expected_bytes(kind, *tensor) for tensor in tensors())


# States that are as large as what they stand for, or twice: they are cut as it is.
ALIKE = ("adamw", "lion", "sgd", "schedule_free")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in OPTIMIZERS.builtin])
def test_no_device_holds_a_whole_state(runs, mesh, kind):
    _, optimizer, *_, path = runs(kind)
    trainable, moments = path[0]
    shardings = optimizer.shardings(jax.eval_shape(lambda: trainable), mesh)
    leaves, places = jax.tree.leaves(moments), jax.tree.structure(moments).flatten_up_to(shardings)
    held = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )
    assert held < (0.5 if kind in ALIKE else 1.0) * sum(leaf.nbytes for leaf in leaves)


# The others compute as one of these does, or as AdamW, which populations and meshes are tested with elsewhere.
APART = ("adamw8bit", "galore", "optax")


@pytest.mark.parametrize(
    "kind", [kind if kind in APART else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_slot_of_a_population_over_eight_devices_is_that_run_alone(runs, mesh, kind):
    settings, optimizer, compiled, _, path = runs(kind)
    # Slots are at other steps than others, and have other numbers.
    (one, first), (other, second) = path[1], path[2]
    alone = (
        (GRADIENTS[1], first, one, jnp.float32(0.1), values_of(settings)),
        (GRADIENTS[2], second, other, jnp.float32(0.02), values_of(settings, 0.9)),
    )
    gradients, moments, trainable, rates, values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    shardings = jax.tree.map(
        lambda sharding: NamedSharding(mesh, PartitionSpec(None, *sharding.spec)), optimizer.shardings(one, mesh)
    )
    moments = jax.device_put(moments, shardings)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jax.jit(jax.vmap(optimizer.apply), out_shardings=(None, shardings, None))
        both = step(gradients, moments, trainable, rates, values)
    for slot, arguments in enumerate(alone):
        for found, expected in zip(*map(jax.tree.leaves, (both, compiled(*arguments))), strict=True):
            np.testing.assert_allclose(np.asarray(found[slot], np.float32), expected, rtol=1e-4, atol=2e-6)


def test_every_state_is_saved_and_read_back_to_the_bit(runs, tmp_path):
    """All in one checkpoint; a step is a function of the state alone, so what goes on from it is what would have."""
    trainable, moments = ({kind: runs(kind)[-1][-1][part] for kind in KINDS} for part in range(2))
    state = TrainState(jnp.int32(3), trainable, moments, jnp.uint32(0))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state, {})
    checkpoints.close()
    loaded = Checkpoints.load(tmp_path / "checkpoints", jax.tree.map(jnp.zeros_like, state), "latest")
    assert loaded is not None
    assert jax.tree.structure(loaded[1]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, loaded[1], state)


def test_sections_are_read_without_jax():
    ask = (
        "import sys; from jaxtune.config.optimizer_section import OPTIMIZERS; "
        "names = [OPTIMIZERS.find(name).__name__ for name in OPTIMIZERS.names()]; "
        "print(len(names), 'jax' in sys.modules, 'optax' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert ended.stdout.split()[1:] == ["False", "False"]
    assert int(ended.stdout.split()[0]) >= len(OPTIMIZERS.builtin)
