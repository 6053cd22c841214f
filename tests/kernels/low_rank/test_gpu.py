"""The Hopper kernels of the low-rank matmul: their values, interpreted on the CPU, and that they compile."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from jaxtune_kernels import keep_mask
from jaxtune_kernels.low_rank.gpu import LARGEST_RANK, low_rank_product
from jaxtune_kernels.low_rank.hopper import SHARED_BYTES, MaskKeys
from jaxtune_kernels.low_rank.hopper_down import down_projection
from jaxtune_kernels.low_rank.hopper_matmul import Tiles, tiles_for

from tests.kernels.hopper_interpreter import hopper_interpreter
from tests.kernels.low_rank.hopper_compile import compile_product

# bfloat16 keeps 8 bits: h, b and y are each rounded once. Relative to the largest sum of absolute values.
TOLERANCE = 2**-8


@pytest.fixture(autouse=True)
def interpreted():
    """In place of the folder's fixture, which interprets TPU kernels: these have an interpreter of their own."""


def _inputs(groups, m, k, n, rank, seed, transposed, ranks=None):
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(jnp.bfloat16)

    x, w = normal(groups, m, k), normal(*((n, k) if transposed else (k, n)))
    a, b, bias = normal(groups, k, rank), normal(groups, rank, n), normal(n).astype(np.float32)
    if ranks is not None:
        a = np.where(np.arange(rank) < np.asarray(ranks)[:, None, None], a, 0)
    scale = generator.uniform(0.5, 2.0, groups).astype(np.float32)
    rate = generator.uniform(0.1, 0.6, groups).astype(np.float32)
    seeds = generator.integers(0, 2**32, groups, dtype=np.uint32)
    rows = generator.integers(0, 2**32, (groups, m), dtype=np.uint32)
    return x, w, a, b, scale, bias, (rate, seeds, rows)


def _float64(x, w, a, b, scale, bias, dropout, transposed, drop, first_column):
    """y and h from the definition, and for each the largest sum of absolute values that goes into an entry."""
    x, w, a, b, scale = (np.asarray(v).astype(np.float64) for v in (x, w, a, b, scale))
    w = w.T if transposed else w
    columns = x.shape[2] if drop == "input" else w.shape[1]
    factor = np.ones((x.shape[0], x.shape[1], columns))
    if dropout is not None:
        for group, (rate, seed, rows) in enumerate(zip(*dropout, strict=True)):
            mask = keep_mask(jnp.asarray(seed), jnp.asarray(rows), first_column + columns, jnp.asarray(rate))
            factor[group] = np.asarray(mask)[:, first_column:] / (1.0 - np.float64(rate))

    def product(x, w, a, b, bias):
        h = (x * factor if drop == "input" else x) @ a
        low_rank = scale[:, None, None] * (h @ b)
        return x @ w + (low_rank * factor if drop == "output" else low_rank) + bias, h

    bias = np.zeros(w.shape[1]) if bias is None else bias
    return product(x, w, a, b, bias), [v.max() for v in product(*(np.abs(v) for v in (x, w, a, b, bias)))]


def _check(inputs, *, transposed, drop, tiles=None, multiprocessors=2, first_column=0):
    options = {"transposed": transposed, "drop": drop, "tiles": tiles, "multiprocessors": multiprocessors}
    options["first_column"] = first_column
    with hopper_interpreter():
        found = jax.block_until_ready(
            jax.jit(functools.partial(low_rank_product, **options))(*jax.tree.map(jnp.asarray, inputs))
        )
    expected, magnitudes = _float64(*inputs, transposed, drop, first_column)
    for name, ours, theirs, magnitude in zip("yh", found, expected, magnitudes, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.abs(np.asarray(ours).astype(np.float64) - theirs).max() / magnitude
        assert error <= TOLERANCE, f"{name}: {error:.1e}"  # false for NaN, which is what nothing has written


def _odd_shapes(examples, m, k, n, rank):
    """Decorates a test with a few shapes up to the given ones; each is interpreted for seconds, so none is shrunk."""

    def decorate(test):
        drawn = given(
            groups=st.integers(1, 2),
            m=st.integers(1, m),
            k=st.integers(1, k),
            n=st.integers(1, n),
            rank=st.integers(1, rank),
            drop=st.sampled_from(["input", "output"]),
            masked=st.booleans(),
            with_bias=st.booleans(),
            seed=st.integers(0, 1000),
        )
        phases = [Phase.explicit, Phase.generate]
        return settings(max_examples=examples, deadline=None, phases=phases, derandomize=True)(drawn(test))

    return decorate


def _check_odd_shape(groups, m, k, n, rank, drop, masked, with_bias, seed):
    transposed = drop == "output"
    x, w, a, b, scale, bias, dropout = _inputs(groups, m, k, n, rank, seed, transposed)
    inputs = (x, w, a, b, scale, bias if with_bias else None, dropout if masked else None)
    _check(inputs, transposed=transposed, drop=drop)


@_odd_shapes(3, m=100, k=150, n=150, rank=40)
def test_odd_shapes_against_float64(**drawn):
    _check_odd_shape(**drawn)


@pytest.mark.slow
@_odd_shapes(6, m=700, k=400, n=600, rank=LARGEST_RANK)
def test_larger_odd_shapes_against_float64(**drawn):
    _check_odd_shape(**drawn)


@pytest.mark.parametrize(("drop", "transposed"), [("input", False), ("output", True)])
def test_groups_of_different_ranks_with_dropout(drop, transposed):
    """Aligned shapes, as models have them: several tiles for a block, more steps than stages, nothing padded."""
    inputs = _inputs(2, 72, 320, 192, 16, 0, transposed, ranks=[5, 16])
    _check(inputs, transposed=transposed, drop=drop, tiles=Tiles(128, 3, 64))


def test_weight_orientation_side_of_the_mask_and_first_column_are_independent():
    inputs = _inputs(1, 8, 64, 64, 16, 1, True)
    _check(inputs, transposed=True, drop="input", tiles=Tiles(128, 3, 32), first_column=100)


def test_slots_that_are_read_by_loads_go_back_to_the_copies_behind_a_fence():
    """More steps than stages, more tiles than blocks: all is filled anew. jax 0.10's interpreter misses no fence."""
    inputs = _inputs(1, 8, 896, 256, 16, 3, False)
    _check(inputs, transposed=False, drop="input", tiles=Tiles(128, 3, 64), multiprocessors=1)
    x, _, a, _, _, _, (rate, seeds, rows) = inputs
    keys = MaskKeys(rows, np.zeros((1, 896), np.uint32), seeds)
    fences = [
        str(jax.make_jaxpr(down_projection)(x, a.swapaxes(1, 2), *masked)).count("commit_smem")
        for masked in ((None, None), (keys, rate))
    ]
    assert fences == [1, 2]


def test_a_large_rank():
    inputs = _inputs(1, 16, 64, 128, LARGEST_RANK, 2, True)
    _check(inputs, transposed=True, drop="output", multiprocessors=1)


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 64, 100, 128])
@pytest.mark.parametrize("shape", [(8192, 4096), (8192, 14336), (700, 1000), (8192, 1024), (1, 1)])
def test_tiles_fit(rank, shape):
    for vectors in (0, 1, 2):
        tiles = tiles_for(*shape, rank, vectors)
        assert tiles.shared_bytes(rank, vectors) <= SHARED_BYTES
        assert tiles.stages >= 3
        assert tiles.columns % tiles.chunk == 0
        assert tiles.columns == 256 or rank > 64 or shape[1] <= 1024


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for_hopper(direction, capfd):
    """What the whole matrix in tests/compile checks, for one shape."""
    compile_product("h200:1", (8, 1024, 1024, 3072), 16, direction, capfd)


def test_what_the_kernel_does_not_take():
    x, w, a, b, scale = map(jnp.asarray, _inputs(1, 8, 64, 64, 4, 0, False)[:5])
    options = {"transposed": False, "drop": "input"}
    with pytest.raises(ValueError, match="bfloat16 or float16 for the Hopper kernel, not float32"):
        low_rank_product(x.astype(jnp.float32), w.astype(jnp.float32), a, b, scale, None, None, **options)
    with pytest.raises(ValueError, match="ranks from 1 to 128, not 129"):
        low_rank_product(x, w, jnp.zeros((1, 64, 129)), jnp.zeros((1, 129, 64)), scale, None, None, **options)
    with pytest.raises(ValueError, match="bytes of shared memory at rank 4"):
        low_rank_product(x, w, a, b, scale, None, None, tiles=Tiles(256, 5, 64), **options)
