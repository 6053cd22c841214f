"""Each optimizer against optax, or the paper's algorithm in float64, one tensor at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.config.optimizer_section import OPTIMIZERS
from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig
from jaxtune.training.optimizers.adamw8bit.quantized import Quantized, dynamic_codes
from jaxtune.training.optimizers.galore.projected import followed
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.full import Full, FullRule

CONFIG = DecoderConfig("llama", 20, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
PLAN = UpdatePlan([FullRule(match="layers.*.{mlp.up,mlp.down,mlp_norm}"), FullRule(match="embed")]).resolve(CONFIG)
RATES = (0.05, 0.2, 0.1, 0.02)
NORM = "layers.mlp_norm.scale"


def made(seed):
    generator = np.random.default_rng(seed)
    parts = (part for part in PLAN.parts if isinstance(part, Full))
    return {part.path: generator.standard_normal(part.shape).astype(np.float32) for part in parts}


def ours(kind, **values):
    """The parameters after each step, by path, and the states."""
    section = OPTIMIZERS.parse({"kind": kind, "clip_norm": 1e6, **values})
    optimizer = section.build(PLAN, "xla")
    numbers = {name: jnp.float32(value) for name, value in hyperparameters(section, "optimizer.").items()}
    trainable = {"low_rank": {}, "full": jax.tree.map(jnp.asarray, made(0))}
    moments, path = optimizer.init(trainable), []
    apply = jax.jit(optimizer.apply)
    for number, rate in enumerate(RATES):
        gradients = {"low_rank": {}, "full": made(10 + number)}
        trainable, moments, _ = apply(gradients, moments, trainable, jnp.float32(rate), numbers)
        path.append((jax.tree.map(np.asarray, trainable["full"]), moments))
    return path


def tensors(arrays):
    """By path and layer."""
    for path, array in arrays.items():
        if path.startswith("layers."):
            yield from (((path, layer), part) for layer, part in enumerate(array))
        else:
            yield (path, None), array


def of_optax(make, read=lambda state, params: params):
    """The parameters after all steps of a transformation that is made for the rate of each step, tensor by tensor."""

    # A dictionary with such keys is no tree of jax's. One layer stands for both, which are moved alike.
    def named(arrays):
        return {str(name): jnp.asarray(array) for name, array in tensors(arrays) if name[1] != 0}

    @jax.jit
    def step(gradients, states, arrays, rate):
        after = {name: make(rate).update(gradients[name], states[name], array) for name, array in arrays.items()}
        states = {name: state for name, (_, state) in after.items()}
        return states, {name: array + after[name][0] for name, array in arrays.items()}

    arrays = named(made(0))
    states = {name: make(1.0).init(array) for name, array in arrays.items()}
    for number, rate in enumerate(RATES):
        states, arrays = step(named(made(10 + number)), states, arrays, jnp.float32(rate))
    return {name: read(states[name], arrays[name]) for name in arrays}


def assert_same(found, expected, rtol=2e-5, atol=2e-6, among=lambda name: True):
    for name, array in tensors(found):
        if among(name) and name[1] != 0:
            np.testing.assert_allclose(array, expected[str(name)], rtol=rtol, atol=atol, err_msg=str(name))


def free(rate):
    return optax.contrib.schedule_free(optax.adamw(rate, 0.0, 0.95, weight_decay=0.1), rate, 0.8)


@pytest.mark.parametrize(
    ("kind", "values", "make"),
    [
        ("lion", {"beta1": 0.8, "beta2": 0.95}, lambda rate: optax.lion(rate, 0.8, 0.95, weight_decay=0.1)),
        (
            "sgd",
            {"momentum": 0.8},
            lambda rate: optax.chain(optax.trace(0.8), optax.add_decayed_weights(0.1), optax.scale(-rate)),
        ),
        (
            "adafactor",
            {"factor_from": 4, "scale_by_parameter": True, "clip_rms": 0.5, "weight_decay": 0.0},
            lambda rate: optax.adafactor(rate, 4, clipping_threshold=0.5),
        ),
        (
            "optax",
            {"name": "nadamw", "numbers": {"b1": 0.8}, "options": {"eps_root": 1e-3}},
            lambda rate: optax.nadamw(rate, 0.8, eps_root=1e-3, weight_decay=0.1),
        ),
    ],
    ids=["lion", "sgd", "adafactor", "optax"],
)
def test_steps_equal_those_of_optax(kind, values, make):
    assert_same(ours(kind, **{"weight_decay": 0.1, **values})[-1][0], of_optax(make))


def test_schedule_free_is_optax_s_at_the_points_that_it_is_evaluated_at():
    expected = of_optax(free, optax.contrib.schedule_free_eval_params)
    assert_same(ours("schedule_free", beta1=0.8, beta2=0.95, weight_decay=0.1)[-1][0], expected)


def test_muon_is_optax_s_for_matrices_of_layers_and_adamw_for_all_else():
    found = ours("muon", weight_decay=0.1, momentum=0.9)[-1][0]
    muon = of_optax(lambda rate: optax.contrib.muon(rate, beta=0.9, weight_decay=0.1, consistent_rms=0.2))
    adam = of_optax(lambda rate: optax.adamw(rate, weight_decay=0.1))
    assert_same(found, muon, rtol=2e-4, atol=2e-5, among=lambda name: name[0].endswith("kernel"))
    assert_same(found, adam, rtol=1e-3, atol=1e-5, among=lambda name: not name[0].endswith("kernel"))


def adam(state, gradient, number, b1=0.9, b2=0.999):
    mean, square = state
    mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
    return (mean, square), mean / (1 - b1**number) / (np.sqrt(square / (1 - b2**number)) + 1e-8)


def test_galore_is_the_paper_s_algorithm():
    """In float64, for wide and tall matrices; the subspace is chosen before the steps 1 and 3."""
    path = ours("galore", rank=3, period=2, scale=0.5, weight_decay=0.1)
    for name, array in tensors(made(0)):
        weights, state, p = array.astype(np.float64), (0.0, 0.0), np.empty(())
        projected, left = name[0].endswith("kernel"), array.ndim == 2 and array.shape[0] <= array.shape[1]
        for number, rate in enumerate(RATES):
            gradient = dict(tensors(made(10 + number)))[name].astype(np.float64)
            if not projected:
                state, direction = adam(state, gradient, number + 1)
            else:
                if number % 2 == 0:
                    u, _, v = np.linalg.svd(gradient, full_matrices=False)
                    p = u[:, :3] if left else v[:3].T
                    # The sign of a singular vector is anyone's; what is kept of earlier means depends on it.
                    theirs = np.asarray(path[number][1]["full"][name[0]][0].projector[name[1]])
                    np.testing.assert_allclose(np.abs(theirs.T @ p), np.eye(3), atol=1e-4)
                    p = p * np.sign(np.sum(p * theirs, axis=0))
                state, direction = adam(state, p.T @ gradient if left else gradient @ p, number + 1)
                direction = 0.5 * (p @ direction if left else direction @ p.T)
            weights = weights - rate * (direction + 0.1 * weights)
            found = dict(tensors(path[number][0]))[name]
            np.testing.assert_allclose(found, weights, rtol=1e-4, atol=1e-5, err_msg=f"{name} {number}")


def test_nothing_is_decomposed_where_no_projector_is_due():
    """Mapped over layers and slots there is one branch, and the decomposition stands inside it."""
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8, 6)), jnp.float32)
    before, due = jnp.zeros((2, 3, 6, 2)), jnp.zeros((2, 3), bool)
    program = jax.make_jaxpr(jax.vmap(jax.vmap(followed)))(due, gradients, before)

    def primitives(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            if equation.primitive.name != "cond":
                for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
                    if hasattr(inner, "eqns"):
                        yield from primitives(inner)

    found = list(primitives(program.jaxpr))
    assert "cond" in found
    assert not any("svd" in name for name in found)
    assert "svd" in str(program)
    one = due.at[1, 2].set(True)
    after = np.asarray(jax.vmap(jax.vmap(followed))(one, gradients, before))
    assert np.all(after[~np.asarray(one)] == 0)
    np.testing.assert_allclose(after[1, 2].T @ after[1, 2], np.eye(2), atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_dynamic_trees(signed):
    codes = dynamic_codes(signed=signed).astype(np.float64)
    assert len(set(codes)) == 256
    assert (codes[-1], 0.0 in codes, np.all(np.diff(codes) > 0)) == (1.0, True, True)
    positive = codes[(codes > 0) & (codes < 1)]
    # Twice as many in each power of ten as below it.
    counts = [np.sum((positive > 10.0**power / 10) & (positive < 10.0**power)) for power in range(-6, 1)]
    assert counts == [(1 if signed else 2) * 2**number for number in range(7)]
    assert positive[0] == pytest.approx(5.5e-7 if signed else 3.25e-7)
    if signed:
        np.testing.assert_array_equal(np.sort(-codes[codes < 0]), positive)


def test_bytes_are_the_nearest_and_steps_those_of_adamw_on_them():
    """The definition in float64: every share is compared with every code."""
    block = 10
    found = ours("adamw8bit", block=block, smallest=100, weight_decay=0.1)[-1][0]

    def stored(array, signed):
        codes = dynamic_codes(signed=signed).astype(np.float64)
        wide = np.empty_like(array)
        for start in range(0, array.shape[1], block):
            part = array[:, start : start + block]
            largest = np.abs(part).max(axis=1, keepdims=True)
            nearest = np.abs(part[..., None] / largest[..., None] - codes).argmin(-1)
            wide[:, start : start + block] = codes[nearest] * largest
        return wide

    for name, array in tensors(made(0)):
        weights, state = array.astype(np.float64), (0.0, 0.0)
        for number, rate in enumerate(RATES):
            gradient = dict(tensors(made(10 + number)))[name].astype(np.float64)
            state, direction = adam(state, gradient, number + 1)
            if array.ndim == 2:
                state = stored(state[0], True), stored(state[1], False)
            weights = weights - rate * (direction + 0.1 * weights)
        np.testing.assert_allclose(dict(tensors(found))[name], weights, rtol=1e-3, atol=1e-4, err_msg=str(name))


def test_a_matrix_narrower_than_a_block_has_blocks_along_its_longer_side():
    array = jnp.asarray(np.random.default_rng(0).standard_normal((600, 4)), jnp.float32)
    stored = Quantized(256).narrowed(array, signed=True)
    assert (stored.codes.shape, stored.largest.shape) == ((600, 4), (3, 4))
    # Half of the widest gap between codes, as a share of the block's largest.
    gap = np.diff(dynamic_codes(signed=True)).max() / 2
    error = np.abs(np.asarray(Quantized(256).widened(stored, signed=True)) - np.asarray(array))
    assert np.all(error <= (gap + 1e-6) * np.repeat(np.asarray(stored.largest), 256, axis=0)[:600])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lamp"}, r"optimizer\.name: optax has no 'lamp'; did you mean 'lamb'"),
        ({"name": "apply_updates"}, r"optimizer: apply_updates of optax cannot be made"),
        ({"name": "lamb", "numbers": {"beta1": 0.5}}, r"optimizer\.numbers\.beta1: lamb of optax has no such argument"),
        (
            {"name": "lamb", "options": {"learning_rate": 1}},
            r"options\.learning_rate: optimizer\.learning_rate says that",
        ),
        ({"name": "constant_schedule", "options": {"value": 1.0}}, "makes no optimizer, but function"),
    ],
)
def test_what_optax_has_not_is_told(values, message):
    with pytest.raises(UserError, match=message):
        OPTIMIZERS.parse({"kind": "optax", **values}).build(PLAN, "auto")
