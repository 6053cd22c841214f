"""Selections at the edge: numbers outside the tensor, none at all; and arrays whose types tell of a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import Selection, masked_update, put_blocks, take_blocks

from tests.kernels.masked_update.compiled import compile_update, kernels
from tests.kernels.masked_update.oracle import COEFFICIENTS, RATE, dense, float64_steps, number_of_block

IMPLEMENTATIONS = ["reference", "xla", "gpu", "tpu"]


def _optimizer(implementation, **options):
    return masked_update(implementation=implementation, interpret=True, **options)


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "block"), [((8, 8, 128), (8, 128)), ((2, 28, 128), (8, 128))])
def test_numbers_outside_select_nothing(implementation, shape, block):
    """Their moments stay as they were, whatever their gradients; and the last block, if it is selected, moves once."""
    params, whole = _normal(*shape), _normal(*shape, seed=1)
    step = jax.jit(_optimizer(implementation).apply)
    for numbers in ([1, 99], [-1, 1], [7, 8], [-9, 6], [-(2**31), 2**31 - 1]):
        selection = Selection(jnp.asarray(numbers, jnp.int32), block)
        state = masked_update().init(params, selection)
        # What sticks out of the tensor is zero in moments.
        start = [np.array(take_blocks(jnp.full(shape, 0.5), selection)) for _ in state.moments]
        inside = [slot for slot, number in enumerate(numbers) if 0 <= number < 8]
        outside = [slot for slot in range(len(numbers)) if slot not in inside]
        grads = np.array(take_blocks(whole, selection))
        assert not grads[outside].any()
        for values in (grads, *start):
            values[outside] = 3.0
        state = state._replace(moments=tuple(map(jnp.asarray, start)))
        new, after = step(jnp.asarray(grads), state, params, RATE, **COEFFICIENTS)

        mask = number_of_block(shape, block)[1](np.asarray(numbers))
        half = [np.full(shape, 0.5)] * 2
        expected, moments = float64_steps("adamw", params, half, [whole], mask, **COEFFICIENTS)
        np.testing.assert_allclose(new, expected, rtol=2e-6, atol=1e-6)
        for ours, theirs in zip(after.moments, moments, strict=True):
            np.testing.assert_array_equal(np.asarray(ours)[outside], 3.0)
            spread = dense(np.asarray(ours)[inside], [numbers[slot] for slot in inside], shape, block)
            np.testing.assert_allclose(spread[mask], theirs[mask], rtol=2e-6, atol=2e-6)
        put = put_blocks(params, selection, jnp.full(grads.shape, 7.0))
        np.testing.assert_array_equal(put, np.where(mask, np.float32(7.0), params))


def test_more_numbers_than_blocks_are_left_to_xla_on_tpus():
    selection = Selection(jnp.arange(10, dtype=jnp.int32))
    params = _normal(8, 8, 128)
    state = masked_update().init(params, selection)
    with pytest.raises(ValueError, match="10 are selected, but there are 8"):
        _optimizer("tpu").apply(state.moments[0], state, params, 0.1)
    compiled, _, _ = compile_update("v5e:2x4", (8, 8, 128), (None, None), 10, "float32", "float32")
    assert "tpu_custom_call" not in compiled.as_text()


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_an_empty_selection(implementation):
    optimizer, params = _optimizer(implementation), _normal(3, 8, 128)
    nothing, some = Selection(jnp.zeros(0, jnp.int32)), Selection(jnp.asarray([0, 2], jnp.int32))
    state = optimizer.init(params, nothing)
    for grads in (params[:0], params):
        same, state = jax.jit(optimizer.apply)(grads, state, params, 0.1)
        np.testing.assert_array_equal(same, params)
    later = jax.jit(optimizer.reselect)(state, params, some)
    assert later.steps.tolist() == [0, 0]
    assert [moment.shape for moment in later.moments] == [(2, 8, 128)] * 2
    assert not any(np.any(moment) for moment in later.moments)
    assert optimizer.reselect(later, params, nothing).moments[0].shape == (0, 8, 128)
    assert take_blocks(params, nothing).shape == (0, 8, 128)
    np.testing.assert_array_equal(put_blocks(params, nothing, params[:0]), params)
    population = jax.vmap(optimizer.init)(params[None], Selection(jnp.zeros((1, 0), jnp.int32)))
    moved, _ = jax.vmap(lambda *operands: optimizer.apply(*operands, 0.1))(params[None, :0], population, params[None])
    np.testing.assert_array_equal(moved[0], params)


@pytest.mark.parametrize("implementation", [None, "xla", "gpu", "tpu"])
def test_it_has_no_derivative(implementation):
    optimizer, params = _optimizer(implementation), _normal(3, 8, 128)
    state = optimizer.init(params, Selection(jnp.asarray([0, 2], jnp.int32)))
    with pytest.raises(NotImplementedError, match="masked_update has no derivative"):
        jax.grad(lambda rate: jnp.sum(optimizer.apply(params[:2], state, params, rate)[0]))(0.1)


BLOCKS = [(2, None), (4, 32), (None, None)]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_and_their_gradients_over_explicit_axes(block):
    params, selection = _normal(16, 128), Selection(jnp.zeros(1, jnp.int32), block)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)

    @jax.jit
    def run(params):
        blocks = take_blocks(params, selection)
        inside = jax.grad(lambda blocks: jnp.sum(put_blocks(params, selection, blocks) ** 2))(blocks)
        return blocks, inside, jax.grad(lambda params: jnp.sum(take_blocks(params, selection) ** 2))(params)

    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P("data", "tensor")))
        found = run(placed)
    for ours, theirs in zip(found, run(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[2].sharding.is_equivalent_to(placed.sharding, 2)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_updates_over_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, P("data"))
    params, selection = _normal(16, 128), Selection(jnp.asarray([1, 3, 4, 7], jnp.int32), (2, None))
    other = Selection(jnp.asarray([0, 3, 5, 7], jnp.int32), (2, None))
    optimizer = _optimizer("gpu", axes={0: ("data",)})
    state, grads = optimizer.init(params, selection), _normal(4, 2, 128, seed=1)
    exact = _optimizer("reference")
    expected, after = jax.jit(exact.apply)(grads, state, params, 0.1)
    whole, all_blocks = masked_update(), Selection(None)
    with jax.set_mesh(mesh):
        placed = jax.device_put((grads, state, params, other), rows)
        new, moved = jax.jit(optimizer.apply)(*placed[:3], 0.1)
        carried = jax.jit(optimizer.reselect)(moved, new, placed[3])
        everything, _ = jax.jit(whole.apply)(placed[2], whole.init(params, all_blocks), placed[2], 0.1)
    assert new.sharding.is_equivalent_to(rows, 2)
    assert moved.moments[0].sharding.is_equivalent_to(rows, 3)
    pairs = ((new, expected), (moved, after), (carried, exact.reselect(after, expected, other)),
             (everything, whole.apply(params, whole.init(params, all_blocks), params, 0.1)[0]))  # fmt: skip
    for ours, theirs in zip(*map(jax.tree.leaves, zip(*pairs, strict=True)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


def test_inside_a_shard_map_that_checks(mesh):
    """The XLA form's values; kernels, which jax's interpreter does not run there, are traced."""
    params, grads = _normal(3, 8, 128), _normal(2, 8, 128, seed=1)
    selection = Selection(jnp.asarray([0, 2], jnp.int32))

    def step(implementation):
        optimizer = masked_update(implementation=implementation)

        def one(params, grads):
            new, state = optimizer.apply(grads, optimizer.init(params, selection), params, 0.1)
            return new, state.moments, jax.grad(lambda b: jnp.sum(put_blocks(params, selection, b) ** 2))(grads)

        return one

    cut = P(None, ("data", "fsdp"))
    with jax.set_mesh(mesh):
        checked = {name: jax.shard_map(step(name), in_specs=cut, out_specs=cut) for name in ("xla", "tpu", "gpu")}
        found = jax.jit(checked["xla"])(params, grads)
        for name in ("tpu", "gpu"):
            traced = jax.make_jaxpr(checked[name])(jnp.zeros((3, 32, 128)), jnp.zeros((2, 32, 128)))
            assert len(kernels(traced.jaxpr)) == 1
    for ours, theirs in zip(*map(jax.tree.leaves, (found, step("reference")(params, grads))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("target", "call"), [("v5e:2x4", "tpu_custom_call"), ("h200:1", "__gpu$xla.gpu.triton")])
def test_the_kernel_of_the_platform_is_that_of_the_mesh(target, call):
    compiled, _, _ = compile_update(
        target, (4, 64, 128), (None, None), 2, "float32", "float32", implementation="pallas"
    )
    assert call in compiled.as_text()
    optimizer, params = masked_update(implementation="pallas"), jnp.ones((4, 64, 128))
    state = optimizer.init(params, Selection(jnp.asarray([1])))
    with pytest.raises(ValueError, match="no Pallas kernel for cpu; implementation 'xla' runs there"):
        optimizer.apply(params, state, params, 0.1)
