"""The wrapper of Pallas kernels, with the smallest kernel that has every kind of operand: ``y = (x · w) * s``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels.transforms import GROUP, first_index, grouped, psum

from jaxtune.parallel.targets import compile_for_target, target_devices

TRIALS, M, K, N = 3, 16, 8, 8
COLUMNS = {"m": ("data", "fsdp"), "n": ("tensor",)}
ROWS = {"m": ("data", "fsdp"), "k": ("tensor",)}


def _body(x, w, s, y):
    y[0] = jnp.dot(x[0], w[...], preferred_element_type=jnp.float32) * s[pl.program_id(0)]


def _launch(cuts, x, w, s):
    g, m, k = x.shape
    n = w.shape[1]
    y = pl.pallas_call(
        _body,
        grid=(g,),
        in_specs=[
            pl.BlockSpec((1, m, k), lambda i: (i, 0, 0)),
            pl.BlockSpec((k, n), lambda i: (0, 0)),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ],
        out_specs=pl.BlockSpec((1, m, n), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((g, m, n), jnp.float32),
    )(x, w, s)
    return psum(y, cuts["k"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(axes, x, w, s):
    return grouped(_launch, ("g m k", "k n", "g"), "g m n", axes)(x[None], w, s[None])[0]


def _forward(axes, x, w, s):
    return _matmul(axes, x, w, s), (x, w, s)


def _backward(axes, residuals, g):
    x, w, s = (jnp.asarray(each) for each in residuals)
    turned = {"m": axes.get("m", ()), "n": axes.get("k", ()), "k": axes.get("n", ())}
    return _matmul(turned, g, w.T, s), s * x.T @ g, jnp.sum(g * (x @ w))


_matmul.defvjp(_forward, _backward)


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((TRIALS, M, K)).astype(np.float32)
    w = generator.standard_normal((K, N)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray([0.5, 1.0, -2.0], jnp.float32)


@pytest.fixture(autouse=True)
def _interpreted(request):
    # jax's plain interpreter: compiled, NaN in all memory that was not written, and allowed under jax.checkpoint.
    if "compiled_for_tpu" in request.node.name:
        yield
        return
    with pltpu.force_tpu_interpret_mode(True):  # pyright: ignore[reportArgumentType]
        yield


def _close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("axes", [COLUMNS, ROWS], ids=["columns cut", "rows cut"])
def test_grad_of_scan_of_remat_under_vmap_on_a_mesh(arrays, mesh, axes):
    x, w, s = arrays

    def loss(layer, x, s):
        def step(x, _):
            return layer(x, s), None

        return jnp.sum(jax.lax.scan(step, x, length=2)[0])

    @jax.checkpoint
    def ours(x, s):
        return jnp.tanh(_matmul(axes, x, w, s))

    def theirs(x, s):
        return jnp.tanh(x @ w * s)

    expected = jax.vmap(jax.value_and_grad(functools.partial(loss, theirs), (0, 1)))(x, s)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(None, ("data", "fsdp"))))
        run = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(loss, ours), (0, 1))))
        _close(run(placed, s), expected)


def test_vmap_merges_into_one_launch_however_it_is_nested(arrays):
    x, w, s = arrays
    shapes = []

    def watched(cuts, *operands):
        shapes.append([operand.shape for operand in operands])
        return _launch(cuts, *operands)

    call = grouped(watched, ("g m k", "k n", "g"), "g m n")

    def alone(x, s):
        return call(x[None], w, s[None])[0]

    y = jax.vmap(jax.vmap(alone, in_axes=(0, None)), in_axes=(None, 0))(x, s[:2])
    _close(y, jnp.einsum("tmk,kn,s->stmn", x, w, s[:2]))
    assert shapes[-1] == [(6, M, K), (K, N), (6,)]


def test_an_operand_without_groups_that_is_mapped_is_taken_one_by_one(arrays):
    x, w, s = arrays
    y = jax.vmap(lambda w, s: _matmul({}, x[0], w, s))(jnp.stack([w, 2 * w, 3 * w]), s)
    _close(y, jnp.einsum("mk,kn,s->smn", x[0], w, s * jnp.arange(1.0, 4.0)))


def test_operands_may_be_trees_with_holes(arrays):
    x, _, s = arrays

    def launch(cuts, x, extra):
        scale, nothing = extra
        assert nothing is None
        return x * scale[:, None, None], scale

    # The names of an operand that is None are not looked at.
    call = grouped(launch, ("g m k", ("g", ("g k", "n"))), ("g m k", "g"))
    y, scale = jax.vmap(lambda x, s: call(x[None], (s[None], None)), in_axes=(0, None))(x, s[2])
    _close(y[:, 0], x * s[2])
    assert scale.shape == (TRIALS, 1)


def test_a_launch_knows_its_place_in_a_dimension_that_is_cut(mesh):
    def launch(cuts, x):
        start = first_index(cuts["m"], x.shape[1])
        return x + jnp.uint32(start) + jnp.arange(x.shape[1], dtype=jnp.uint32)

    call = grouped(launch, ("g m",), "g m", {"m": ("data", "fsdp", "elsewhere")})
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(call)(jnp.zeros((1, 12), jnp.uint32)), np.arange(12)[None])
        # Ten rows cannot be cut in four: they stay whole.
        np.testing.assert_array_equal(jax.jit(call)(jnp.zeros((1, 10), jnp.uint32)), np.arange(10)[None])


def test_inside_a_shard_map_of_the_caller_nothing_is_cut_again(arrays, mesh):
    x, w, s = arrays
    with jax.set_mesh(mesh):
        y = jax.jit(
            jax.shard_map(
                lambda x: _matmul(COLUMNS, x, w, s[0]), in_specs=P("data"), out_specs=P("data"), check_vma=False
            )
        )(x[0])
    _close(y, x[0] @ w * s[0])


@pytest.mark.parametrize(
    ("operands", "results", "axes", "message"),
    [
        (("g m k", "k n", "g"), "m n", {}, "'m n' does not start with 'g'"),
        (("g m", "k n", "g"), "g m n", {}, r"\(3, 16, 8\) has no dimensions 'g m'"),
        (("g m k", "m n", "g"), "g m n", {}, "'m' has sizes 16 and 8"),
        (("g m k", "k n", "g"), "g m n", {"m": ("data",), "n": ("data",)}, "'data' is named for two dimensions"),
    ],
)
def test_wrong_names(arrays, mesh, operands, results, axes, message):
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        grouped(_launch, operands, results, axes)(*arrays)


@pytest.mark.parametrize("trial_axis", [False, True])
def test_compiled_for_tpu_a_population_is_one_launch_without_a_gather(trial_axis):
    names = ("trial", "data") if trial_axis else ("data", "tensor")
    mesh = Mesh(np.array(target_devices("v5e:2x2")).reshape(2, 2), names, axis_types=(AxisType.Auto,) * 2)
    axes = {GROUP: ("trial",), "m": ("data",), "n": ("tensor",)}

    def struct(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    x = struct((8, 256, 128), P("trial" if trial_axis else None, "data"))
    w = struct((128, 256), P(None, None if trial_axis else "tensor"))
    s = struct((8,), P("trial" if trial_axis else None))
    with jax.set_mesh(mesh):
        text = compile_for_target(jax.vmap(functools.partial(_matmul, axes), in_axes=(0, None, 0)), x, w, s).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    for forbidden in ("all-gather", "all-to-all", "collective-permute", " while("):
        assert forbidden not in text, forbidden
