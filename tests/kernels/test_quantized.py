"""Matrices of few bits: their codes against bitsandbytes and NumPy, and products and gradients against autodiff."""

from __future__ import annotations

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import Quantized, low_rank_matmul, quantize, quantized_matmul
from jaxtune_kernels.low_rank.tpu import low_rank_product
from jaxtune_kernels.low_rank.tpu_tiles import Tiles
from jaxtune_kernels.quantized import NF4, Kind, block_count

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


def dynamic_map():
    """The 256 values that bitsandbytes quantizes absmax to (dynamic tree quantization, arXiv:2110.02861)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        ends = np.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * (ends[1:] + ends[:-1]) / 2
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


def test_absmax_in_bfloat16_is_as_good_as_in_either_form_of_bitsandbytes():
    """Float32, and quantized once more: the mean taken off, and the nearest of 256 values in blocks of 256."""
    w = weights(256, 1024)
    codes = np.asarray(quantize(jnp.asarray(w), "nf4").codes).astype(int)
    absmax = np.abs(w.reshape(-1, 64, 256)).max(axis=1)
    mean = absmax.mean()
    groups = (absmax.T - mean).reshape(-1, 256)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    table = dynamic_map()
    nearest = table[np.abs((groups / largest)[..., None] - table).argmin(axis=-1)]
    forms = {
        "float32": absmax,
        "once more": (nearest * largest + mean).reshape(256, -1).T,
        "ours": absmax.astype(jnp.bfloat16).astype(np.float32),
    }
    assert len(table) == 256
    errors = {
        name: np.linalg.norm((NF4[codes].reshape(-1, 64, 256) * form[:, None]).reshape(w.shape) - w) / np.linalg.norm(w)
        for name, form in forms.items()
    }
    assert errors["float32"] <= errors["ours"] < 1.001 * errors["float32"]
    assert errors["ours"] < 1.0005 * errors["once more"]


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


def interpreted(function):
    """The function, compiled, with kernels for TPU in jax's plain interpreter."""

    def call(*operands):
        with pltpu.force_tpu_interpret_mode(True):  # pyright: ignore[reportArgumentType]
            return jax.jit(function)(*operands)

    return call


@pytest.mark.parametrize(("kind", "inputs"), [("nf4", 1024), ("int8", 1024), ("nf4", 192)])
def test_the_kernel_makes_the_matrix_of_its_codes(kind, inputs):
    """Bit for bit as with the matrix given, in tiles that cut W both ways, forward and backward; 192: in one tile."""
    held = quantize(jnp.asarray(weights(256, inputs)), kind)
    plain = held.dequantized(jnp.bfloat16)
    generator = np.random.default_rng(2)
    for transposed in (False, True):
        inner, outer = (256, inputs) if transposed else (inputs, 256)
        x, a, b = (
            jnp.asarray(generator.standard_normal(shape), dtype)
            for shape, dtype in (
                ((2, 64, inner), jnp.bfloat16),
                ((2, inner, RANK), jnp.float32),
                ((2, RANK, outer), jnp.float32),
            )
        )
        cut = Tiles(1, 32, 512, 128) if transposed else Tiles(1, 32, 128, 512)
        tiles = cut if inputs > 512 else Tiles(1, 32, outer, inner)
        found, wanted = (
            interpreted(
                lambda x, w, a, b, t=transposed, tiles=tiles: low_rank_product(
                    x, w, a, b, jnp.ones(2), None, None, transposed=t, drop="input", tiles=tiles
                )
            )(x, w, a, b)
            for w in (held, plain)
        )
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_products_of_the_kernel_are_those_of_xla():
    """Values and gradients, of what the kernel makes of codes and of what is written out for it (fp8, blocks of 32)."""
    generator = np.random.default_rng(3)
    cases: tuple[tuple[Kind, int], ...] = (("nf4", INPUTS), ("fp8", INPUTS), ("nf4", 96))
    for kind, inputs in cases:
        held = quantize(jnp.asarray(weights(inputs=inputs)), kind)
        x, a, b = (
            jnp.asarray(generator.standard_normal(shape), jnp.float32)
            for shape in ((4, inputs), (inputs, RANK), (RANK, OUTPUTS))
        )

        def loss(x, a, b, held=held, how="xla"):
            return jnp.sum(jnp.sin(low_rank_matmul(x, held, a, b, 0.3, implementation=how)))

        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
        found = jax.jit(functools.partial(gradient, how="interpret"))(x, a, b)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(gradient)(x, a, b)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_kernel_compiles_for_tpus(kind):
    """Forward and backward at 4096 × 14336 on v5e: it fits on chip, and W is never written out beside it."""
    place = SingleDeviceSharding(target_devices("v5e:1x1")[0])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    kernel = jax.eval_shape(functools.partial(quantize, kind=kind), jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16))
    codes, absmax = (array(each.shape, each.dtype) for each in (kernel.codes, kernel.absmax))
    for transposed in (False, True):
        inner, outer = (14336, 4096) if transposed else (4096, 14336)

        def product(x, codes, absmax, a, b, transposed=transposed):
            drop = "output" if transposed else "input"
            held = Quantized(codes, absmax)
            return low_rank_product(x, held, a, b, jnp.ones(1), None, None, transposed=transposed, drop=drop)

        x, a, b = (
            array((1, 2048, inner), jnp.bfloat16),
            *(array(s, jnp.float32) for s in ((1, inner, 16), (1, 16, outer))),
        )
        compiled = compile_for_target(product, x, codes, absmax, a, b)
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 8e6


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
