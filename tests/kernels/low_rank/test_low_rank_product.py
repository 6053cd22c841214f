"""The grouped launch for TPU, interpreted, against float64 and against its own count of bytes."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from jax.experimental.pallas import tpu as pltpu
from jaxtune_kernels import keep_mask
from jaxtune_kernels.low_rank import tpu_kernel_moves_less
from jaxtune_kernels.low_rank.tpu import _block_specs, low_rank_product
from jaxtune_kernels.low_rank.tpu_tiles import VMEM_BUDGET, Problem, Tiles, choose_tiles, hbm_bytes, vmem_bytes

# Relative to the largest sum of absolute values that goes into an entry: float32 sums up to 300 products; bfloat16
# rounds scale · h and the result to 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}

# Blocks that cut every dimension of the shapes below, some with a ragged end, and those that are chosen for them.
TILES = st.sampled_from([None, (128, 128, 128), (32, 128, 256), (64, 256, 128), (32, 700, 128), (700, 128, 700)])


def _operands(g, m, k, n, r, transposed, dropout, dtype, seed):
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    # Rounded first, for the reference as well.
    x = normal(g, m, k).astype(jnp.dtype(dtype))
    w = normal(*((n, k) if transposed else (k, n))).astype(jnp.dtype(dtype))
    a, b = (v.astype(jnp.dtype(dtype)).astype(np.float32) for v in (normal(g, k, r), normal(g, r, n)))
    # Adapters of different ranks: the columns beyond a rank are zero.
    ranks = generator.integers(1, r + 1, g)
    a = a * (np.arange(r) < ranks[:, None])[:, None]
    scale = np.linspace(0.25, 2.0, g).astype(np.float32)
    draws = None
    if dropout:
        rows = generator.integers(0, 2**32, (g, m), dtype=np.uint32)
        draws = (np.linspace(0.0, 0.6, g).astype(np.float32), np.arange(g, dtype=np.uint32), rows)
    return jax.tree.map(jnp.asarray, (x, w, a, b, scale, normal(n), draws))


def _float64(x, w, a, b, scale, bias, dropout, transposed, drop):
    """y and h from the definition, and the sums of absolute values that go into them."""

    def product(x, w, a, b, scale, bias, factors):
        inside, outside = (factors, 1.0) if drop == "input" else (1.0, factors)
        h = (x * inside) @ a
        return x @ w + scale[:, None, None] * (h @ b) * outside + bias, h

    x, w, a, b, scale, bias = (np.asarray(v).astype(np.float64) for v in (x, w, a, b, scale, bias))
    w = w.T if transposed else w
    columns = x.shape[-1] if drop == "input" else w.shape[-1]
    factors = np.ones((len(x), 1, 1))
    if dropout is not None:
        each = zip(*dropout, strict=True)
        factors = np.stack([keep_mask(seed, rows, columns, rate) / (1 - np.float64(rate)) for rate, seed, rows in each])
    y, h = product(x, w, a, b, scale, bias, factors)
    y_size, h_size = product(*(np.abs(v) for v in (x, w, a, b, scale, bias)), factors)
    return (y, y_size), (h, h_size)


def _check(results, expected, dtype):
    for ours, (value, size), name in zip(results, expected, "yh", strict=True):
        assert ours.dtype == dtype
        # Not a number anywhere is an error that is not a number, and larger than the tolerance for this comparison.
        error = np.max(np.abs(np.asarray(ours).astype(np.float64) - value)) / np.max(size)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


def _run(operands, transposed, drop, tiles=None):
    return jax.jit(lambda *v: low_rank_product(*v, transposed=transposed, drop=drop, tiles=tiles))(*operands)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("transposed", "drop"), [(False, "input"), (True, "output")], ids=["forward", "backward"])
@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate])  # each shape compiles: no shrinking
@given(
    g=st.integers(1, 4),
    m=st.integers(1, 700),
    k=st.integers(1, 300),
    n=st.integers(1, 300),
    r=st.integers(1, 64),
    tiles=TILES,
    dropout=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_float64(dtype, transposed, drop, g, m, k, n, r, tiles, dropout, seed):
    operands = _operands(g, m, k, n, r, transposed, dropout, dtype, seed)
    if tiles is not None:
        tiles = Tiles(1, *(min(tile, size) for tile, size in zip(tiles, (m, n, k), strict=True)))
    _check(_run(operands, transposed, drop, tiles), _float64(*operands, transposed, drop), dtype)


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((4, 48, 256, 200, 5), Tiles(2, 48, 128, 128)),  # two adapters in a block
        ((1, 1024, 1024, 2048, 8), Tiles(1, 1024, 2048, 512)),  # a block of rows in parts
        ((2, 40, 1100, 130, 8), Tiles(1, 32, 128, 1024)),  # A's masked chunks over a ragged end of K
    ],
)
@pytest.mark.parametrize(("transposed", "drop"), [(False, "input"), (True, "output")], ids=["forward", "backward"])
def test_forms_of_a_block(shape, tiles, transposed, drop):
    operands = _operands(*shape, transposed, True, "float32", 0)
    _check(_run(operands, transposed, drop, tiles), _float64(*operands, transposed, drop), "float32")


@pytest.mark.parametrize(("transposed", "drop"), [(False, "input"), (True, "output")], ids=["forward", "backward"])
def test_reads_and_writes_within_bounds_of_simulated_memory(transposed, drop):
    # The simulator of a TPU's memories stops at an access out of bounds and fills what it allocates with NaN.
    operands = _operands(3, 70, 300, 200, 5, transposed, True, "float32", 1)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        results = _run(operands, transposed, drop, Tiles(1, 32, 128, 128))
    _check(results, _float64(*operands, transposed, drop), "float32")


def test_every_tile_draws_the_same_mask():
    operands = _operands(2, 96, 256, 256, 4, True, True, "float32", 2)
    whole, _ = _run(operands, True, "output", Tiles(1, 96, 256, 256))
    cut, _ = _run(operands, True, "output", Tiles(1, 32, 128, 128))
    np.testing.assert_allclose(whole, cut, rtol=1e-5, atol=1e-4)


def test_a_w_of_the_wrong_orientation_is_refused():
    operands = _operands(1, 8, 16, 32, 2, False, False, "float32", 0)
    with pytest.raises(ValueError, match=r"W of shape \(16, 32\) does not fit"):
        low_rank_product(*operands, transposed=True, drop="input")


PROBLEMS = [
    Problem(1, 8192, 4096, 4096, 16, 2, 2),
    Problem(1, 8192, 4096, 14336, 16, 2, 2, True),
    Problem(1, 8192, 14336, 4096, 64, 4, 4, True),
    Problem(8, 256, 1024, 3072, 8, 2, 2, True),
    Problem(8, 2048, 1024, 2048, 16, 4, 2),
    Problem(3, 700, 1000, 300, 5, 4, 4),
    Problem(2, 300, 5000, 777, 5, 2, 2),
    Problem(1, 1, 1, 1, 1, 2, 2),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_bytes_are_those_that_a_walk_over_the_grid_fetches(problem):
    tiles = choose_tiles(problem)
    assert vmem_bytes(problem, tiles) <= VMEM_BUDGET
    specs = _block_specs(problem, tiles, transposed=False, drop="input")
    g, m, k, n, r = problem[:5]
    size = problem.x_bytes
    shapes = {
        "x": ((g, m, k), size),
        "w": ((k, n), problem.w_bytes),
        "a": ((g, r, k), size),
        "b": ((g, r, n), size),
        "y": ((g, m, n), size),
        "h": ((g, m, math.ceil(r / 128) * 128), size),
    }
    if problem.dropout:
        shapes["row_key"] = ((g, m, 128), 4)
    total = 0
    for name, (shape, entry) in shapes.items():
        previous = None
        for step in np.ndindex(*tiles.grid(problem)):
            index = tuple(int(i) for i in specs[name].index_map(*step))
            if index != previous:
                # A last block may be cut short; h and the row words are wider in memory than their blocks say.
                block = [b if b != 1 or s != 128 else 128 for b, s in zip(specs[name].block_shape, shape, strict=True)]
                block[-1] = shape[-1] if name in ("h", "row_key") else block[-1]
                total += math.prod(min(b, s - i * b) for b, s, i in zip(block, shape, index, strict=True)) * entry
            previous = index
    assert hbm_bytes(problem, tiles) == total


@pytest.mark.parametrize(
    ("m", "k", "n", "favoured"),
    [
        (8192, 4096, 4096, True),
        (8192, 1024, 3072, True),
        (8192, 4096, 14336, False),  # x, or the gradient, is read more than once
        (8, 4096, 4096, False),  # decoding: nearly all is W, once, with either
    ],
)
def test_the_default_follows_the_bytes(m, k, n, favoured):
    assert tpu_kernel_moves_less(Problem(1, m, k, n, 16, 2, 2)) is favoured


def test_x_is_read_once_at_the_shapes_of_a_layer():
    problem = PROBLEMS[0]
    tiles = choose_tiles(problem)
    _, rows, columns, inner = tiles.grid(problem)
    assert inner == 1 or columns == 1
    assert rows == 8


def test_small_adapters_share_a_block_and_w_is_read_once_for_it():
    problem = Problem(8, 256, 1024, 3072, 8, 2, 2)
    assert choose_tiles(problem).groups > 1
    assert hbm_bytes(problem, choose_tiles(problem)) < 8 * hbm_bytes(
        problem._replace(g=1), choose_tiles(problem._replace(g=1))
    )
