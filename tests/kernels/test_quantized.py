"""Matrices of few bits: their codes against bitsandbytes and NumPy, and products and gradients against autodiff."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import Quantized, low_rank_matmul, quantize, quantized_matmul
from jaxtune_kernels.quantized import NF4, block_count

from jaxtune.parallel import make_mesh
from jaxtune.parallel.targets import compile_for_target, target_devices

KINDS = ("nf4", "int8", "fp8")
# What the codes of a kind are off by at most, as a share of their block's absmax.
STEPS = {"nf4": 0.152, "int8": 0.5 / 127, "fp8": 16 / 448}
INPUTS, OUTPUTS, RANK = 192, 10, 3


def weights(outputs=OUTPUTS, inputs=INPUTS, seed=0):
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


def test_nf4_codes_are_those_of_bitsandbytes():
    """The bytes that bitsandbytes 0.50.2 makes of these weights, a block of zeros among them; it holds (out, in)."""
    theirs = ((np.arange(8 * 128) * 7919 % 2003 - 1001).astype(np.float32) / 1024).reshape(8, 128)
    theirs[0, :64] = 0
    codes = np.asarray(quantize(jnp.asarray(theirs.T), "nf4").codes).T.astype(np.uint8)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).tobytes()
    assert packed[:34].hex() == "77" * 32 + "0ffe"
    assert hashlib.sha256(packed).hexdigest() == "0995e31b2213932f140f546932e1ccca510172bf51bb4dba6fab8649a3b98f4a"


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
def test_nf4_is_the_nearest_of_sixteen_values(seed, exponent):
    w = weights(seed=seed) * np.float32(2.0**exponent)
    held = quantize(jnp.asarray(w), "nf4")
    blocks = w.astype(np.float64).reshape(-1, 64, OUTPUTS)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    distance = np.abs(blocks[..., None] / absmax[..., None] - NF4.astype(np.float64))
    codes = np.asarray(held.codes).astype(int).reshape(blocks.shape)
    chosen = np.take_along_axis(distance, codes[..., None], axis=-1)[..., 0]
    assert (chosen <= distance.min(axis=-1) + 1e-6).all()
    expected = (NF4[codes] * absmax.astype(jnp.bfloat16)).reshape(w.shape)
    np.testing.assert_allclose(held.dequantized(jnp.float32), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_is_off_by_half_a_step(kind):
    w = weights()
    blocks = w.reshape(block_count(kind, INPUTS), -1, OUTPUTS)
    allowed = np.broadcast_to((STEPS[kind] + 0.004) * np.abs(blocks).max(axis=1, keepdims=True), blocks.shape)
    off = np.abs(np.asarray(quantize(jnp.asarray(w), kind).dequantized(jnp.float32)) - w)
    assert (off <= allowed.reshape(w.shape)).all()


def test_blocks():
    assert [block_count("nf4", size) for size in (64, 352, 4096)] == [1, 11, 64]
    with pytest.raises(ValueError, match="100 inputs are no whole blocks of 64 or 32"):
        block_count("nf4", 100)


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_matrix(kind):
    """Against plain autodiff of the matrix that is written out, for a population of two as well."""
    held = quantize(jnp.asarray(weights()), kind)
    plain = held.dequantized(jnp.float32)
    generator = np.random.default_rng(1)
    shapes = (2, 4, INPUTS), (2, INPUTS, RANK), (2, RANK, OUTPUTS)
    x, a, b = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)

    def adapted(x, a, b):
        return jnp.sum(jnp.sin(low_rank_matmul(x, held, a, b, 0.3, implementation="xla")))

    def frozen(x, a, b):
        return jnp.sum(jnp.sin(quantized_matmul(x, held) + (x @ a) @ b))

    def expected(scale):
        return lambda x, a, b: jnp.sum(jnp.sin(x @ plain + scale * (x @ a) @ b))

    for ours, theirs in ((adapted, expected(0.3)), (frozen, expected(1.0))):
        found, wanted = (jax.jit(jax.vmap(jax.grad(each, argnums=(0, 1, 2))))(x, a, b) for each in (ours, theirs))
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    reference = low_rank_matmul(x[0], held, a[0], b[0], 0.3, implementation="reference")
    np.testing.assert_allclose(reference, x[0] @ plain + 0.3 * (x[0] @ a[0]) @ b[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [True, False])
def test_what_a_product_keeps_are_codes(adapter):
    held = quantize(jnp.asarray(weights()), "nf4")
    x, a, b = jnp.ones((4, INPUTS)), jnp.ones((INPUTS, RANK)), jnp.ones((RANK, OUTPUTS))

    def product(x):
        return low_rank_matmul(x, held, a, b, 1.0) if adapter else quantized_matmul(x, held)

    _, pullback = jax.vjp(product, x)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == held.shape]
    assert [leaf.dtype for leaf in kept] == [jnp.uint4]


def _held(mesh, inputs, outputs, axis):
    """Abstract NF4 codes and absmax whose inputs are cut over a mesh axis, and which are whole in the product."""
    cut, whole = (SingleDeviceSharding(mesh.devices.flat[0]),) * 2
    if mesh.size > 1:
        cut, whole = NamedSharding(mesh, P(axis)), NamedSharding(mesh, P())
    return (
        jax.ShapeDtypeStruct((inputs, outputs), jnp.uint4, sharding=cut),
        jax.ShapeDtypeStruct((inputs // 64, outputs), jnp.bfloat16, sharding=cut),
        None if mesh.size == 1 else (whole, whole),
    )


@pytest.mark.compile
def test_the_matrix_is_never_written_on_a_tpu():
    """A 4096 × 14336 product on v5e: no temporaries, and four bits of W are moved where bfloat16 moves sixteen."""
    mesh = make_mesh(1, 1, 1, target_devices("v5e:1x1"))
    codes, absmax, _ = _held(mesh, 4096, 14336, None)
    for width, backward in ((4096, False), (14336, True)):
        x = jax.ShapeDtypeStruct((2048, width), jnp.bfloat16, sharding=codes.sharding)

        def product(x, codes, absmax, backward=backward):
            held = Quantized(codes, absmax)
            if not backward:
                return quantized_matmul(x, held)
            return jax.vjp(lambda x: quantized_matmul(x, held), jnp.zeros((2048, 4096), x.dtype))[1](x)[0]

        compiled = compile_for_target(product, x, codes, absmax)
        memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
        assert memory is not None
        assert costs is not None
        assert memory.temp_size_in_bytes == 0
        moved = (costs[0] if isinstance(costs, list) else costs)["bytes accessed"]
        assert moved < (180e6 if not backward else 350e6)


@pytest.mark.compile
def test_codes_are_gathered_on_tpus():
    mesh = make_mesh(1, 4, 1, target_devices("v5e:2x2"))
    codes, absmax, places = _held(mesh, 4096, 4096, "fsdp")
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))

    def gradient(x, codes, absmax):
        return jax.grad(lambda x: jnp.sum(quantized_matmul(x, Quantized(codes, absmax, places)) ** 2))(x)

    text = compile_for_target(gradient, x, codes, absmax).as_text() or ""
    gathered = [line.split(" all-gather")[0] for line in text.splitlines() if " all-gather" in line and " = " in line]
    assert any("u4[" in line for line in gathered)
    assert not any("bf16[4096,4096]" in line for line in gathered)
