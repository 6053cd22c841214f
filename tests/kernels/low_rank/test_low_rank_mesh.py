"""The Pallas path on eight devices and over a population, against the portable implementation on one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import low_rank_matmul

TRIALS, LAYERS, ROWS, SIZE, RANK = 3, 2, 16, 24, 6
AXES = {
    "outputs cut": {"rows": ("data", "fsdp"), "outputs": ("tensor",)},
    "inputs cut": {"rows": ("data", "fsdp"), "inputs": ("tensor",)},
    "trials over data": {"rows": ("fsdp",), "outputs": ("tensor",), "trials": ("data",)},
}


@pytest.fixture(scope="module")
def arrays():
    keys = iter(jax.random.split(jax.random.key(3), 8))
    # Ranks that differ between trials: zero columns of A beyond them.
    active = jnp.arange(RANK) < jnp.asarray([2, 6, 4])[:, None]
    a = jax.random.normal(next(keys), (TRIALS, LAYERS, SIZE, RANK)) * active[:, None, None] / 4
    return {
        "x": jax.random.normal(next(keys), (TRIALS, 4, ROWS // 4, SIZE)),
        "w": jax.random.normal(next(keys), (LAYERS, SIZE, SIZE)) / 4,
        "bias": jax.random.normal(next(keys), (LAYERS, SIZE)),
        "a": a,
        "b": jax.random.normal(next(keys), (TRIALS, LAYERS, RANK, SIZE)) / 4,
        "scale": jnp.asarray([0.5, 2.0, 1.0]),
        "rate": jnp.asarray([0.0, 0.3, 0.6]),
        "seed": jnp.arange(TRIALS, dtype=jnp.uint32),
    }


def _step(arrays, matmul, remat=False):
    """Losses and gradients of a population, two scanned layers with W and the bias in common."""

    def loss(x, a, b, scale, rate, seed):
        def layer(x, weights):
            w, bias, a, b = weights
            return jnp.tanh(matmul(x, w, a, b, scale, bias=bias, dropout_rate=rate, dropout_seed=seed)), None

        layer = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x, (arrays["w"], arrays["bias"], a, b))[0] ** 2)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    return jax.jit(jax.vmap(gradient))(*(arrays[name] for name in ("x", "a", "b", "scale", "rate", "seed")))


@pytest.fixture(scope="module")
def expected(arrays):
    return _step(arrays, functools.partial(low_rank_matmul, implementation="xla"))


def _close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", list(AXES))
def test_population_on_a_mesh(arrays, expected, mesh, name, remat):
    matmul = functools.partial(low_rank_matmul, implementation="tpu", axes=AXES[name])
    with jax.set_mesh(mesh):
        placed = arrays | {"x": jax.device_put(arrays["x"], NamedSharding(mesh, P(None, ("data", "fsdp"))))}
        _close(_step(placed, matmul, remat), expected)


def test_each_trial_is_its_own_call(arrays, expected):
    matmul = functools.partial(low_rank_matmul, implementation="tpu")
    for trial in range(TRIALS):
        single = {name: v if name in ("w", "bias") else v[trial : trial + 1] for name, v in arrays.items()}
        _close(_step(single, matmul), jax.tree.map(lambda v, trial=trial: v[trial : trial + 1], expected))


def test_a_trained_bias_of_each_trial_is_exact_too(arrays):
    x, w, a, b = arrays["x"], arrays["w"][0], arrays["a"][:, 0], arrays["b"][:, 0]
    biases = jnp.stack([arrays["bias"][0] * factor for factor in (1.0, 2.0, 3.0)])

    def run(implementation):
        def loss(x, a, b, scale, bias):
            return jnp.sum(low_rank_matmul(x, w, a, b, scale, bias=bias, implementation=implementation) ** 2)

        return jax.vmap(jax.grad(loss, argnums=(0, 1, 4)))(x, a, b, arrays["scale"], biases)

    _close(run("tpu"), run("xla"))
