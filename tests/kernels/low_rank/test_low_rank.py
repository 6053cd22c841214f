from __future__ import annotations

import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import keep_mask, low_rank_matmul

# Largest error, relative to the largest sum of absolute values that goes into an entry (sums may cancel). float32 has
# sums of sums of up to 70 products; bfloat16 rounds the rank-r product and the result to 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


FAST = pytest.mark.parametrize("implementation", ["xla", "tpu"])


def _inputs(m, k, n, r, seed=0, dtype="float32"):
    # NumPy, so that a new shape compiles nothing but the kernel.
    generator = np.random.default_rng(seed)
    shapes = [(m, k), (k, n), (k, r), (r, n), (n,), (m, n)]
    # What bfloat16 rounds off the inputs is not the kernel's error: round first, for the reference as well.
    x, kernel, a, b, bias, g = (generator.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    a, b, bias = (v.astype(np.float32) for v in (a, b, bias))
    return tuple(jnp.asarray(v) for v in (x, kernel, a, b, np.float32(0.75), bias, g))


def _float64(x, kernel, a, b, scale, bias, g, keep, rate):
    """Values and gradients in float64 NumPy, from the definition."""
    x, kernel, a, b, scale, bias, g = (np.asarray(v).astype(np.float64) for v in (x, kernel, a, b, scale, bias, g))
    factor = keep / (1.0 - rate)
    z = x * factor
    y = x @ kernel + scale * (z @ a @ b) + bias
    gradients = {
        "x": g @ kernel.T + scale * (g @ b.T @ a.T) * factor,
        "kernel": x.T @ g,
        "a": scale * (z.T @ (g @ b.T)),
        "b": scale * ((z @ a).T @ g),
        "scale": np.sum(g * (z @ a @ b)),
        "bias": g.sum(axis=0),
    }
    return y, gradients


def _check(actual, expected, magnitude, tolerance, name):
    actual = np.asarray(actual).astype(np.float64)
    error = np.max(np.abs(actual - expected)) / np.max(magnitude)
    assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])  # each shape compiles: no shrinking
@given(
    m=st.integers(1, 70),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 16),
    rate=st.sampled_from([None, 0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_against_float64(implementation, dtype, m, k, n, r, rate, seed):
    *inputs, g = _inputs(m, k, n, r, seed, dtype)

    @jax.jit
    def run(x, kernel, a, b, scale, bias, g):
        def function(x, kernel, a, b, scale, bias):
            return low_rank_matmul(
                x, kernel, a, b, scale, bias=bias, dropout_rate=rate, dropout_seed=seed, implementation=implementation
            )

        y, pullback = jax.vjp(function, x, kernel, a, b, scale, bias)
        return y, dict(zip(("x", "kernel", "a", "b", "scale", "bias"), pullback(g), strict=True))

    y, gradients = run(*inputs, g)
    assert y.dtype == dtype
    # Masks for the largest shape, cut: a bit does not depend on the shape.
    keep = np.asarray(keep_mask(seed, jnp.arange(70, dtype=jnp.uint32), 40, rate or 0.0))[:m, :k]
    expected_y, expected = _float64(*inputs, g, keep, rate or 0.0)
    magnitude_y, magnitude = _float64(*(np.abs(v) for v in (*inputs, g)), keep, rate or 0.0)
    _check(y, expected_y, magnitude_y, TOLERANCE[dtype], "y")
    for name, value in expected.items():
        _check(gradients[name], value, magnitude[name], TOLERANCE[dtype], name)


@FAST
def test_dtypes_of_gradients_are_those_of_inputs(implementation):
    x, kernel, a, b, scale, _, _ = _inputs(5, 8, 6, 2, dtype="bfloat16")
    gradients = jax.grad(
        lambda *v: low_rank_matmul(*v, implementation=implementation).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3, 4)
    )(x, kernel, a, b, scale)
    assert [v.dtype.name for v in gradients] == ["bfloat16", "bfloat16", "float32", "float32", "float32"]


@FAST
def test_rate_zero_is_no_dropout(implementation):
    x, kernel, a, b, scale, _, _ = _inputs(33, 24, 17, 4)
    run = functools.partial(low_rank_matmul, x, kernel, a, b, scale, implementation=implementation)
    plain = run()
    zero = jax.jit(lambda rate: run(dropout_rate=rate, dropout_seed=3))
    # Two compiled programs, so up to rounding; that the mask keeps everything is tested exactly in test_dropout.
    np.testing.assert_allclose(zero(jnp.float32(0.0)), plain, rtol=1e-5, atol=2e-5)
    assert np.abs(zero(jnp.float32(0.5)) - plain).max() > 0.1


@FAST
def test_dropout_follows_row_identities(implementation):
    x, kernel, a, b, scale, _, _ = _inputs(12, 24, 17, 4)
    rows = jnp.arange(100, 112, dtype=jnp.uint32)

    def run(x, rows):
        return low_rank_matmul(
            x, kernel, a, b, scale, dropout_rate=0.5, dropout_seed=3, rows=rows, implementation=implementation
        )

    order = np.random.default_rng(0).permutation(12)
    shuffled = run(x[order].reshape(3, 4, 24), rows[order].reshape(3, 4)).reshape(12, 17)
    np.testing.assert_allclose(shuffled, run(x, rows)[order], rtol=1e-5, atol=1e-5)


@FAST
def test_zero_columns_of_a_have_no_effect_and_no_gradient(implementation):
    x, kernel, a, b, scale, _, g = _inputs(9, 8, 7, 6)
    active = jnp.arange(6) < 4

    def run(a, b):
        return low_rank_matmul(x, kernel, a * active, b, scale, implementation=implementation)

    y, pullback = jax.vjp(run, a, b)
    np.testing.assert_allclose(y, low_rank_matmul(x, kernel, a[:, :4], b[:4], scale), rtol=1e-5, atol=1e-5)
    da, db = pullback(g)
    assert not np.any(da[:, 4:])
    assert not np.any(db[4:])


@FAST
def test_transforms_agree_with_plain_calls(implementation):
    """vmap over adapters with W in common, scan over layers, remat: each against one call at a time."""
    layers, trials = 3, 4
    x, _, _, _, _, _, _ = _inputs(10, 12, 12, 4)
    keys = jax.random.split(jax.random.key(1), 3)
    kernel = jax.random.normal(keys[0], (layers, 12, 12)) / 4
    a = jax.random.normal(keys[1], (trials, layers, 12, 4)) / 4
    b = jax.random.normal(keys[2], (trials, layers, 4, 12)) / 4
    scale = jnp.linspace(0.2, 1.0, trials)
    seeds = jnp.arange(trials, dtype=jnp.uint32)

    def loss(adapter, scale, seed, layer_call):
        def layer(x, weights):
            w, a, b = weights
            call = functools.partial(low_rank_matmul, dropout_rate=0.2, implementation=implementation)
            return jnp.tanh(layer_call(call)(x, w, a, b, scale, dropout_seed=seed)), None

        return jnp.sum(jax.lax.scan(layer, x, (kernel, *adapter))[0] ** 2)

    def unrolled(adapter, scale, seed):
        y = x
        for i in range(layers):
            y = jnp.tanh(
                low_rank_matmul(
                    y, kernel[i], adapter[0][i], adapter[1][i], scale, dropout_rate=0.2, dropout_seed=seed,
                    implementation="reference",
                )
            )  # fmt: skip
        return jnp.sum(y**2)

    unrolled_alone = jax.jit(jax.value_and_grad(unrolled))
    for wrapper in (lambda f: f, jax.checkpoint):
        mapped = jax.jit(jax.vmap(jax.value_and_grad(lambda *args, w=wrapper: loss(*args, w))))((a, b), scale, seeds)
        for trial in range(trials):
            alone = unrolled_alone((a[trial], b[trial]), scale[trial], seeds[trial])
            for ours, theirs in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(ours[trial], theirs, rtol=2e-4, atol=2e-5)


def _weight_shaped_results(function, *arguments) -> list[str]:
    """Instructions of the compiled program, other than parameters and plumbing, that give a 48 × 80 array."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    results = re.findall(r"= f32\[(?:3,)?(?:48,80|80,48)\]\S* (\w[\w-]*)\(", text)
    plumbing = {"parameter", "get-tuple-element", "bitcast", "copy", "dynamic-slice", "reshape"}
    return [result for result in results if result not in plumbing]


@FAST
@pytest.mark.parametrize("scanned", [False, True])
def test_a_frozen_kernel_has_no_weight_gradient(scanned, implementation):
    x, kernel, a, b, scale, _, _ = _inputs(16, 48, 80, 4)

    def loss(kernel, a, b, x):
        def layer(x, _):
            y = low_rank_matmul(x, kernel, a, b, scale, dropout_rate=0.1, dropout_seed=0, implementation=implementation)
            return x + jnp.sum(y**2), None

        if scanned:
            return jnp.sum(jax.lax.scan(layer, x, length=3)[0])
        return jnp.sum(layer(x, None)[0])

    trained = _weight_shaped_results(jax.grad(loss, argnums=(0, 1, 2)), kernel, a, b, x)
    frozen = _weight_shaped_results(jax.grad(loss, argnums=(1, 2)), kernel, a, b, x)
    assert trained, "the check does not see a weight gradient where there is one"
    # A fused slice of W itself is no gradient; a matmul is.
    assert not [name for name in frozen if name != "fusion"], frozen
    assert len(frozen) < len(trained)


@FAST
def test_saves_its_input_and_the_rank_r_product_only(implementation):
    x, kernel, a, b, scale, bias, _ = _inputs(30, 20, 25, 3)

    def run(x, a, b):
        return low_rank_matmul(
            x, kernel, a, b, scale, bias=bias, dropout_rate=0.3, dropout_seed=1, implementation=implementation
        )

    saved = jax.tree.leaves(jax.eval_shape(lambda *v: jax.vjp(run, *v)[1], x, a, b))
    by_rows = [leaf.shape for leaf in saved if leaf.ndim and leaf.shape[0] == 30]
    assert sorted(by_rows) == [(30,), (30, 3), (30, 20)]  # row identities, h, x: neither mask nor a dropped-out x


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_partitions_without_gathering_operands():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    x, kernel, a, b, scale, _, _ = _inputs(16, 48, 80, 4)
    specs = [P("data"), P(None, "tensor"), P(), P(None, "tensor")]

    def loss(x, kernel, a, b):
        return jnp.sum(low_rank_matmul(x, kernel, a, b, scale, dropout_rate=0.3, dropout_seed=1) ** 2)

    placed = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((x, kernel, a, b), specs, strict=True)]
    function = jax.jit(jax.value_and_grad(loss, argnums=(2, 3)))
    assert "all-gather" not in function.lower(*placed).compile().as_text()
    for ours, theirs in zip(
        jax.tree.leaves(function(*placed)), jax.tree.leaves(function(x, kernel, a, b)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@FAST
def test_empty_inputs(implementation):
    """Each of the sizes zero in turn: what remains of the sum, and gradients of the inputs' shapes."""
    sizes = {"m": 3, "k": 5, "n": 4, "r": 2}

    @jax.jit
    def run(*inputs, g):
        def function(*operands, bias):
            drop = {"dropout_rate": 0.5, "dropout_seed": 1}
            return low_rank_matmul(*operands, bias=bias, implementation=implementation, **drop)

        y, pullback = jax.vjp(lambda *inputs: function(*inputs[:-1], bias=inputs[-1]), *inputs)
        return y, pullback(g)

    for name in sizes:
        *inputs, g = _inputs(*(sizes | {name: 0}).values())
        y, gradients = run(*inputs, g=g)
        x, kernel, *_, bias = (np.asarray(v) for v in inputs)
        if name in "kr":
            np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-5, atol=1e-5)
        assert [v.shape for v in gradients] == [np.shape(v) for v in inputs]
    x, kernel, a, b, scale, _, _ = _inputs(3, 5, 4, 2)
    none = jax.jit(jax.vmap(lambda x: low_rank_matmul(x, kernel, a, b, scale, implementation=implementation)))(
        x[:0, None]
    )
    assert none.shape == (0, 1, 4)


def test_a_second_derivative_is_exact_or_refused():
    x, kernel, a, b, scale, _, _ = _inputs(5, 8, 6, 2)

    def curvature(implementation, a):
        def loss(a):
            return jnp.sum(jnp.tanh(low_rank_matmul(x, kernel, a, b, scale, implementation=implementation)))

        return jax.jit(jax.grad(lambda a: jnp.sum(jax.grad(loss)(a) ** 2)))(a)

    np.testing.assert_allclose(curvature("xla", a), curvature("reference", a), rtol=1e-3, atol=1e-4)
    with pytest.raises(NotImplementedError, match="no second derivative; use implementation='xla'"):
        curvature("tpu", a)
    with pytest.raises(NotImplementedError, match="no second derivative; use implementation='xla'"):
        jax.vmap(functools.partial(curvature, "tpu"))(a[None])


def test_what_bad_arguments_get(mesh):
    x, kernel, a, b, scale, _, _ = _inputs(4, 4, 4, 2)
    with pytest.raises(ValueError, match=r"'triton'; choose from reference, xla, pallas, tpu, gpu"):
        low_rank_matmul(x, kernel, a, b, scale, implementation="triton")
    with pytest.raises(ValueError, match="needs a dropout_seed"):
        low_rank_matmul(x, kernel, a, b, scale, dropout_rate=0.1)
    with pytest.raises(ValueError, match="no Pallas kernel for cpu"):
        low_rank_matmul(x, kernel, a, b, scale, implementation="pallas")
    with pytest.raises(ValueError, match="axes: unknown dimension 'm'; choose from rows, inputs, outputs, trials"):
        low_rank_matmul(x, kernel, a, b, scale, axes={"m": ("data",)})
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="'tpu' under a mesh needs axes"):
        low_rank_matmul(x, kernel, a, b, scale, implementation="tpu")
