"""Every implementation against float64, torch and optax; what is not selected is compared bit for bit."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jaxtune_kernels import Selection, masked_update, put_blocks, take_blocks
from jaxtune_kernels.masked_update import gpu, tpu

from tests.kernels.masked_update.oracle import COEFFICIENTS, RATE, dense, float64_steps, problem

IMPLEMENTATIONS = ["reference", "xla", "gpu", "tpu"]
MOMENTS = {"adamw": 2, "sgd": 1, "lion": 1}


def _optimizer(rule="adamw", implementation="xla", interpret=True, **options):
    return masked_update(rule, implementation=implementation, interpret=interpret, **options)


def _run(optimizer, task, whole=False):
    params, state = jnp.asarray(task.params), optimizer.init(jnp.asarray(task.params), task.selection)
    step = jax.jit(optimizer.apply)
    for number, grad in enumerate(task.grads):
        grad = jnp.asarray(grad) if whole else take_blocks(jnp.asarray(grad), task.selection)
        params, state = step(grad, state, params, RATE, **COEFFICIENTS, seed=np.uint32(number))
    return np.asarray(params), state


def _bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


@st.composite
def _tasks(draw, aligned: bool):
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    leading = draw(st.sampled_from([(), (2,), (2, 3)]))
    if aligned:
        parts = [8, 16, 24], [128, 256]
    else:
        parts = list(range(1, 20)), list(range(1, 40))
    block = tuple(
        draw(st.sampled_from([None, *(part for part in choice if part <= side)]))
        for choice, side in zip(parts, (rows, columns), strict=True)
    )
    return problem((*leading, rows, columns), block, draw(st.sampled_from([0.1, 0.5, 1.0])), draw(st.integers(0, 99)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])  # each shape compiles: no shrinking
@given(data=st.data(), rule=st.sampled_from(sorted(MOMENTS)), whole=st.booleans())
def test_against_float64_over_odd_shapes(implementation, data, rule, whole):
    task = data.draw(_tasks(aligned=implementation == "tpu"))
    params, state = _run(_optimizer(rule, implementation), task, whole)
    zeros = [np.zeros(task.params.shape)] * MOMENTS[rule]
    expected, moments = float64_steps(rule, task.params, zeros, task.grads, task.mask, **COEFFICIENTS)
    # Three steps, each rounding parameter and direction once or twice; the direction is at most some units.
    np.testing.assert_allclose(params, expected, rtol=2e-6, atol=5e-7)
    for ours, theirs in zip(state.moments, moments, strict=True):
        spread = dense(ours, task.selection.indices, task.params.shape, task.block)
        np.testing.assert_allclose(spread, theirs, rtol=2e-6, atol=2e-6)
    assert state.steps.tolist() == [3] * len(task.selection.indices)
    np.testing.assert_array_equal(_bits(params)[~task.mask], _bits(task.params)[~task.mask])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", sorted(MOMENTS))
def test_bfloat16_lands_on_a_neighbour_and_all_implementations_on_the_same(implementation, rule):
    task = problem((2, 40, 300), (16, 128), dtype="bfloat16", steps=1)
    params, state = _run(_optimizer(rule, implementation, moment_dtype=jnp.bfloat16), task)
    zeros = [np.zeros(task.params.shape)] * MOMENTS[rule]
    expected, moments = float64_steps(rule, task.params, zeros, task.grads, task.mask, **COEFFICIENTS)
    assert params.dtype == jnp.bfloat16
    # Neighbours are at most 2^-7 apart.
    np.testing.assert_allclose(params.astype(np.float64), expected, rtol=2.0**-7, atol=1e-9)
    for ours, theirs in zip(state.moments, moments, strict=True):
        assert ours.dtype == jnp.bfloat16
        spread = dense(ours, task.selection.indices, task.params.shape, task.block)
        np.testing.assert_allclose(spread, theirs, rtol=2.0**-7, atol=1e-12)
    np.testing.assert_array_equal(_bits(params)[~task.mask], _bits(task.params)[~task.mask])
    # The same random bits: only where the last bit of a float32 differs between programs may a rounding.
    same, _ = _run(_optimizer(rule, "reference", moment_dtype=jnp.bfloat16), task)
    assert np.mean(_bits(params) != _bits(same)) < 1e-3
    other = jax.jit(_optimizer(rule, "reference", moment_dtype=jnp.bfloat16).apply)(
        take_blocks(jnp.asarray(task.grads[0]), task.selection),
        _optimizer(rule, moment_dtype=jnp.bfloat16).init(jnp.asarray(task.params), task.selection),
        jnp.asarray(task.params), RATE, **COEFFICIENTS, seed=np.uint32(77),
    )[0]  # fmt: skip
    assert np.mean(_bits(other)[task.mask] != _bits(same)[task.mask]) > 0.1


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_against_torch(implementation):
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    weight, grads = generator.standard_normal((12, 20)), generator.standard_normal((30, 12, 20)) * 1e-2
    selection = Selection(jnp.zeros(1, jnp.int32))
    settings_of = {
        "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}, {"weight_decay": 0.1}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9}, {}),
    }
    for rule, (kind, theirs, ours) in settings_of.items():
        parameter = torch.nn.Parameter(torch.tensor(weight))
        reference = kind([parameter], lr=1e-2, **theirs)
        optimizer = _optimizer(rule, implementation)
        params = jnp.asarray(weight, jnp.float32)
        state = optimizer.init(params, selection)
        step = jax.jit(optimizer.apply)
        for grad in grads:
            parameter.grad = torch.tensor(grad)
            reference.step()
            params, state = step(jnp.asarray(grad[None], jnp.float32), state, params, 1e-2, **ours)
        # Thirty roundings of numbers of about one.
        np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ("lion", optax.lion(1e-2, b1=0.9, b2=0.99, weight_decay=0.1)),
        ("adamw", optax.adamw(1e-2, weight_decay=0.1)),
        ("sgd", optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-1e-2))),
    ],
)
def test_against_optax(rule, theirs):
    generator = np.random.default_rng(1)
    params = expected = jnp.asarray(generator.standard_normal((10, 7)), jnp.float32)
    optimizer = _optimizer(rule)
    state, their_state = optimizer.init(params, Selection(jnp.zeros(1, jnp.int32))), theirs.init(params)
    ours, update = jax.jit(optimizer.apply), jax.jit(theirs.update)
    for grad in generator.standard_normal((10, 10, 7)).astype(np.float32):
        updates, their_state = update(jnp.asarray(grad), their_state, expected)
        expected = optax.apply_updates(expected, updates)
        params, state = ours(jnp.asarray(grad[None]), state, params, 1e-2, weight_decay=0.1)
    np.testing.assert_allclose(params, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_poison_stays_where_it_is(implementation):
    """NaN in all that is not selected, of parameters and gradients: none gets in, and none is touched."""
    task = problem((2, 40, 300), (16, 128), steps=2)
    clean, _ = _run(_optimizer(implementation=implementation), task, whole=True)
    poisoned = problem((2, 40, 300), (16, 128), steps=2)
    poisoned.params[~task.mask] = np.nan
    for grad in poisoned.grads:
        grad[~task.mask] = np.nan
    params, state = _run(_optimizer(implementation=implementation), poisoned, whole=True)
    np.testing.assert_array_equal(_bits(params)[task.mask], _bits(clean)[task.mask])
    np.testing.assert_array_equal(_bits(params)[~task.mask], _bits(poisoned.params)[~task.mask])
    assert all(np.isfinite(m).all() for m in state.moments)


def _check_against_float64(task, params, state):
    zeros = [np.zeros(task.params.shape)] * len(state.moments)
    expected, moments = float64_steps("adamw", task.params, zeros, task.grads, task.mask, **COEFFICIENTS)
    np.testing.assert_allclose(params, expected, rtol=2e-6, atol=5e-7)
    for ours, theirs in zip(state.moments, moments, strict=True):
        spread = dense(ours, task.selection.indices, task.params.shape, task.block)
        np.testing.assert_allclose(spread, theirs, rtol=2e-6, atol=2e-6)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 × 128, so that small tensors have many."""
    monkeypatch.setattr(tpu, "_TILE_ELEMENTS", 8 * 128)
    monkeypatch.setattr(tpu, "_TILE_COLUMNS", 128)


@pytest.mark.usefixtures("small_tiles")
def test_tpu_copies_do_not_race():
    """The interpreter that copies as the machine does, step by step, with buffers of NaN."""
    task = problem((48, 768), (16, 256), share=0.6, steps=1)
    checked = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    _check_against_float64(task, *_run(_optimizer(implementation="tpu", interpret=checked), task))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("shape", "block"), [((2, 40, 600), (24, 384)), ((50, 130), (None, None)), ((3, 5), (None, None))]
)
def test_tpu_tiles_that_stick_out_or_lie_outside(shape, block):
    task = problem(shape, block, share=1.0, steps=2)
    _check_against_float64(task, *_run(_optimizer(implementation="tpu"), task, whole=True))


@pytest.mark.parametrize(("module", "implementation"), [(gpu, "gpu"), (tpu, "tpu")])
def test_results_do_not_depend_on_tiles(monkeypatch, module, implementation):
    task = problem((40, 384), (None, 256), share=1.0, dtype="bfloat16", steps=2)
    optimizer = _optimizer(implementation=implementation, moment_dtype=jnp.bfloat16)
    first, state = _run(optimizer, task)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 16 * 128)
    if module is tpu:
        monkeypatch.setattr(module, "_TILE_COLUMNS", 128)
    second, other = _run(optimizer, task)
    np.testing.assert_array_equal(_bits(first), _bits(second))
    for ours, theirs in zip(state.moments, other.moments, strict=True):
        np.testing.assert_array_equal(_bits(ours), _bits(theirs))


def test_half_the_blocks_have_half_the_state():
    params = jnp.zeros((8, 16, 32))

    def nbytes(count, dtype):
        state = masked_update(moment_dtype=dtype).init(params, Selection(jnp.arange(count, dtype=jnp.int32)))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        # Two moments, and for each block its number and its count of updates.
        assert [nbytes(count, dtype) for count in (1, 4, 8)] == [
            count * (2 * 16 * 32 * size + 8) for count in (1, 4, 8)
        ]


def test_gradients_through_taken_blocks_are_those_of_the_tensor():
    task = problem((3, 10, 7), (4, 3), steps=1)
    params, weights = jnp.asarray(task.params), jnp.asarray(task.grads[0])
    loss = lambda p: jnp.sum(jnp.sin(p) * weights)  # noqa: E731
    blocks = take_blocks(params, task.selection)
    by_blocks = jax.grad(lambda b: loss(put_blocks(params, task.selection, b)))(blocks)
    np.testing.assert_array_equal(by_blocks, take_blocks(jax.grad(loss)(params), task.selection))
    np.testing.assert_array_equal(put_blocks(params, task.selection, blocks), params)


def test_trees_with_tensors_left_out_vectors_and_scalars_of_their_own():
    params = {"a": jnp.ones((4, 6)), "norm": jnp.ones(5), "gain": jnp.ones(()), "frozen": jnp.ones(3)}
    whole = Selection(jnp.zeros(1, jnp.int32))
    selection = {"a": Selection(jnp.asarray([1]), (2, None)), "norm": whole, "gain": whole, "frozen": None}
    optimizer = masked_update("sgd")
    state = optimizer.init(params, selection)
    grads = jax.tree.map(jnp.ones_like, params)
    new, state = jax.jit(optimizer.apply)(grads, state, params, 0.5)
    np.testing.assert_array_equal(new["a"], np.repeat([1, 1, 0.5, 0.5], 6).reshape(4, 6))
    np.testing.assert_array_equal(new["norm"], np.full(5, 0.5))
    assert new["gain"] == 0.5
    np.testing.assert_array_equal(new["frozen"], np.ones(3))
    assert state["frozen"] is None


def test_what_bad_arguments_get():
    with pytest.raises(ValueError, match="unknown rule 'adam'; choose from adamw, sgd, lion"):
        masked_update("adam")
    with pytest.raises(ValueError, match="'triton'; choose from reference, xla, pallas, tpu, gpu"):
        masked_update(implementation="triton")
    with pytest.raises(ValueError, match="float16 is neither float32 nor bfloat16"):
        masked_update(moment_dtype=jnp.float16)
    params, selection = jnp.ones((40, 300)), Selection(jnp.asarray([1]), (16, 100))
    with pytest.raises(ValueError, match="does not fit a tensor whose last two dimensions are"):
        masked_update().init(params, Selection(selection.indices, (41, 1)))
    state = masked_update(moment_dtype=jnp.bfloat16).init(params, selection)
    with pytest.raises(ValueError, match="rounding to bfloat16 needs a seed"):
        masked_update().apply(params, state, params, 0.1)
    state = masked_update().init(params, selection)
    with pytest.raises(ValueError, match="neither those of the selected blocks"):
        masked_update().apply(params[:10], state, params, 0.1)
    with pytest.raises(ValueError, match="columns must be a multiple of 128"):
        masked_update(implementation="tpu").apply(params, state, params, 0.1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(3, 24, 130), (16, 128), (7,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_selection_of_everything_is_that_of_all_blocks(implementation, shape, dtype):
    generator = np.random.default_rng(0)
    params, grad = (jnp.asarray(generator.standard_normal(shape), dtype) for _ in range(2))
    count = shape[0] if len(shape) == 3 else 1
    results = []
    for indices in (None, jnp.arange(count)):
        optimizer = _optimizer(implementation=implementation, moment_dtype=dtype)
        state, moved = optimizer.init(params, Selection(indices)), params
        for number in range(2):
            moved, state = optimizer.apply(grad, state, moved, RATE, **COEFFICIENTS, seed=number)
        results.append((moved, state.moments, state.steps))
    for everything, listed in zip(*map(jax.tree.leaves, results), strict=True):
        # Two programs: rounding may differ by a bit, and so a stochastic rounding goes the other way where it is close.
        unequal = _bits(everything.reshape(-1)) != _bits(listed.reshape(-1))
        assert np.mean(unequal) < 0.02 or dtype == "float32"
        np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (everything, listed)), rtol=1e-2, atol=1e-5)
    assert not np.array_equal(results[0][0], params)


def test_a_selection_of_everything_stays():
    optimizer, params = _optimizer(), jnp.ones((2, 8, 128))
    state = optimizer.init(params, Selection(None))
    with pytest.raises(ValueError, match="a selection of all blocks stays"):
        optimizer.reselect(state, params, Selection(jnp.arange(1)))
