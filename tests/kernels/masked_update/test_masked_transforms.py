"""Reselecting, vmap, scan, meshes and optax: the masked update inside other people's programs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import Selection, masked_transformation, masked_update, share_out_blocks, take_blocks

from tests.kernels.masked_update.oracle import COEFFICIENTS, RATE, dense, float64_steps, number_of_block, problem


def _optimizer(implementation="xla", rule="adamw", **options):
    return masked_update(rule, implementation=implementation, interpret=True, **options)


def test_reselect_carries_what_stays_and_starts_what_comes():
    shape, block = (2, 10, 7), (4, 3)
    task = problem(shape, block, steps=5)
    first, second = (Selection(jnp.asarray(i, jnp.int32), block) for i in ([0, 3, 7, 12], [1, 3, 12, 17]))
    optimizer = _optimizer()
    params, state = jnp.asarray(task.params), optimizer.init(jnp.asarray(task.params), first)
    expected, moments, taken = task.params, [np.zeros(shape)] * 2, np.zeros(shape)
    for selection, grads in ((first, task.grads[:2]), (second, task.grads[2:])):
        if selection is second:
            state = optimizer.reselect(state, params, selection)
        mask = number_of_block(shape, block)[1](np.asarray(selection.indices))
        # A block that comes back, or comes, starts from zero: moments and the count that corrects them.
        moments = [np.where(mask, m, 0.0) for m in moments]
        expected, moments = float64_steps("adamw", expected, moments, grads, mask, first=taken + 1, **COEFFICIENTS)
        taken = np.where(mask, taken + len(grads), 0)
        for grad in grads:
            params, state = optimizer.apply(
                take_blocks(jnp.asarray(grad), selection), state, params, RATE, **COEFFICIENTS
            )
    np.testing.assert_allclose(params, expected, rtol=5e-6, atol=1e-6)
    assert state.steps.tolist() == [3, 5, 5, 3]
    for ours, theirs in zip(state.moments, moments, strict=True):
        np.testing.assert_allclose(dense(ours, second.indices, shape, block), theirs, rtol=2e-6, atol=2e-6)


def test_other_indices_and_scalars_compile_nothing():
    traces = {"apply": 0, "reselect": 0}
    optimizer = _optimizer()

    @jax.jit
    def apply(grads, state, params, rate, scalars, seed):
        traces["apply"] += 1
        return optimizer.apply(grads, state, params, rate, **scalars, seed=seed)

    @jax.jit
    def reselect(state, params, selection):
        traces["reselect"] += 1
        return optimizer.reselect(state, params, selection)

    params = jnp.ones((6, 4, 8))
    selections = [Selection(jnp.asarray(i, jnp.int32)) for i in ([0, 2, 4], [1, 2, 5], [3, 4, 5])]
    state = optimizer.init(params, selections[0])
    for number, selection in enumerate(selections):
        state = reselect(state, params, selection)
        scalars = {name: value * (1 + number / 10) for name, value in COEFFICIENTS.items()}
        new, state = apply(jnp.ones((3, 4, 8)), state, params, 0.1 * number + 0.1, scalars, np.uint32(number))
        moved = np.asarray(new != params).any(axis=(1, 2))
        assert np.flatnonzero(moved).tolist() == selection.indices.tolist()
        params = new
    assert traces == {"apply": 1, "reselect": 1}


def _launches(jaxpr, inside_loop=False) -> list[bool]:
    """For each kernel launch in a program, whether it stands in a loop."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(inside_loop)
            continue
        loop = inside_loop or equation.primitive.name in ("scan", "while")
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _launches(inner, loop)
    return found


@pytest.mark.parametrize("implementation", ["reference", "xla", "gpu", "tpu"])
def test_a_population_is_one_launch(implementation):
    """Trials with parameters, selections, rates and seeds of their own, in two nested maps."""
    optimizer = _optimizer(implementation, moment_dtype=jnp.bfloat16)
    shape, block, trials = (32, 256), (16, 128), (2, 2)
    tasks = [problem(shape, block, seed=seed, steps=1) for seed in range(4)]
    stacked = lambda values: jnp.stack([jnp.asarray(v) for v in values]).reshape(*trials, *np.shape(values[0]))  # noqa: E731
    params = stacked([task.params for task in tasks])
    indices = stacked([task.selection.indices for task in tasks])
    grads = stacked([task.grads[0] for task in tasks])
    rates, seeds = stacked(list(np.float32([0.1, 0.2, 0.3, 0.4]))), stacked(list(np.arange(4, dtype=np.uint32)))

    def step(params, indices, grads, rate, seed):
        state = optimizer.init(params, Selection(indices, block))
        params, state = optimizer.apply(grads, state, params, rate, **COEFFICIENTS, seed=seed)
        return params, state.moments

    population = jax.vmap(jax.vmap(step))
    arguments = (params, indices, grads, rates, seeds)
    mapped = jax.jit(population)(*arguments)
    if implementation in ("gpu", "tpu"):
        assert _launches(jax.make_jaxpr(population)(*arguments).jaxpr) == [False]
    alone = jax.jit(step)
    for i, j in np.ndindex(*trials):
        one = alone(*(argument[i, j] for argument in arguments))
        for ours, theirs in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            # Two programs: up to rounding, which for bfloat16 is up to a neighbour.
            wide = (np.asarray(v).astype(np.float32) for v in (ours[i, j], theirs))
            np.testing.assert_allclose(*wide, rtol=2e-6 if ours.dtype == jnp.float32 else 2.0**-7, atol=1e-6)
        assert np.mean(np.asarray(mapped[1][0][i, j] != one[1][0])) < 1e-3


def test_trials_from_one_start_in_a_scan():
    optimizer = _optimizer()
    task = problem((4, 6, 5), (None, None), steps=3)
    grads = jnp.asarray(np.stack(task.grads))

    def train(params, rate):
        def body(carry, grad):
            params, state = carry
            return optimizer.apply(grad, state, params, rate, **COEFFICIENTS), None

        return jax.lax.scan(body, (params, optimizer.init(params, task.selection)), grads)[0][0]

    rates = jnp.asarray([0.01, 0.1])
    mapped = jax.jit(jax.vmap(train, in_axes=(None, 0)))(jnp.asarray(task.params), rates)
    for ours, rate in zip(mapped, rates, strict=True):
        theirs, _ = float64_steps(
            "adamw", task.params, [np.zeros(task.params.shape)] * 2, task.grads, task.mask, rate=rate, **COEFFICIENTS
        )
        np.testing.assert_allclose(ours, theirs, rtol=5e-6, atol=1e-6)


# Blocks, how the tensor is cut, and where moments are cut. In turn: layers with each layer cut inside; rows of blocks
# shared out; both dimensions shared out; layers shared out and cut.
CUTS = [
    ((6, 16, 24), (None, None), {1: ("fsdp",), 2: ("tensor",)}, P(None, "fsdp", "tensor"), [1, 3, 4]),
    ((16, 24), (2, None), {0: ("fsdp", "tensor")}, P(("fsdp", "tensor")), [0, 3, 5, 7]),
    ((16, 24), (4, 6), {0: ("fsdp",), 1: ("tensor",)}, P(("fsdp", "tensor")), [1, 3, 4, 7, 8, 9, 10, 15]),
    ((6, 16, 24), (None, None), {0: ("fsdp",), 1: ("tensor",)}, P("fsdp", "tensor"), [1, 2, 3, 5]),
]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(("shape", "block", "axes", "moment_spec", "indices"), CUTS)
@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_devices_update_their_own_and_gather_nothing(mesh, implementation, shape, block, axes, moment_spec, indices):
    task = problem(shape, block, dtype="bfloat16", steps=1)
    counts = [int(np.prod([mesh.shape[axis] for axis in axes.get(d, ())])) for d in range(len(shape))]
    selection = share_out_blocks(Selection(jnp.asarray(indices, jnp.int32), block), shape, counts)
    plain = _optimizer(moment_dtype=jnp.bfloat16)
    optimizer = _optimizer(implementation, moment_dtype=jnp.bfloat16, axes=axes)
    params, grads = jnp.asarray(task.params), take_blocks(jnp.asarray(task.grads[0]), selection)
    expected, expected_state = jax.jit(plain.apply)(
        grads, plain.init(params, selection), params, RATE, **COEFFICIENTS, seed=jnp.uint32(5)
    )

    def place(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    param_spec = P(*(axes.get(d) for d in range(len(shape))))
    slots = P(moment_spec[0])
    state = plain.init(params, selection)
    state = type(state)(
        place(state.indices, slots), place(state.steps, slots), tuple(place(m, moment_spec) for m in state.moments)
    )
    step = jax.jit(lambda *arguments: optimizer.apply(*arguments, **COEFFICIENTS, seed=jnp.uint32(5)))
    arguments = (place(grads, moment_spec), state, place(params, param_spec), jnp.float32(RATE))
    with jax.set_mesh(mesh):
        text = step.lower(*arguments).compile().as_text()
        new, new_state = step(*arguments)
        other = jax.jit(optimizer.reselect)(new_state, new, selection)
    assert not re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", text)
    assert new.sharding.is_equivalent_to(NamedSharding(mesh, param_spec), new.ndim)
    for ours, theirs in ((new, expected), *zip(new_state.moments, expected_state.moments, strict=True)):
        # The bits are those of the element, on whichever device: two programs differ in the last bit of a float32.
        assert np.mean(np.asarray(ours) != np.asarray(theirs)) < 2e-3
    for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(new_state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_trials_on_a_mesh_stay_on_their_devices():
    trial_mesh = jax.make_mesh((4, 2), ("trial", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    optimizer = _optimizer(axes={-2: ("fsdp",)}, trial_axes=("trial",))
    plain = _optimizer()
    generator = np.random.default_rng(0)
    params = jnp.asarray(generator.standard_normal((4, 3, 8, 6)), jnp.float32)
    grads = jnp.asarray(generator.standard_normal((4, 2, 8, 6)), jnp.float32)
    selection = Selection(jnp.asarray([[0, 2], [0, 1], [1, 2], [0, 2]], jnp.int32))

    def step(optimizer):
        def one(params, grads, indices, rate):
            state = optimizer.init(params, Selection(indices))
            return optimizer.apply(grads, state, params, rate)

        return jax.jit(jax.vmap(one))

    rates = jnp.linspace(0.1, 0.4, 4)
    expected = step(plain)(params, grads, selection.indices, rates)
    cut = NamedSharding(trial_mesh, P("trial", None, "fsdp"))
    by_trial = NamedSharding(trial_mesh, P("trial"))
    arguments = (*jax.device_put((params, grads), cut), *jax.device_put((selection.indices, rates), by_trial))
    with jax.set_mesh(trial_mesh):
        text = step(optimizer).lower(*arguments).compile().as_text()
        ours = step(optimizer)(*arguments)
    assert not re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", text)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_cuts_that_do_not_fit_are_refused(mesh):
    params = jnp.ones((16, 24))
    cases = [
        ({0: ("fsdp",)}, (2, None), [0, 1, 2], "number of selected blocks"),
        ({0: ("fsdp",)}, (6, None), [0, 1], "does not consist of whole blocks"),
        ({2: ("fsdp",)}, (2, None), [0, 1], "no dimension 2"),
    ]
    with jax.set_mesh(mesh):
        for axes, block, indices, message in cases:
            optimizer = _optimizer(axes=axes)
            state = optimizer.init(params, Selection(jnp.asarray(indices, jnp.int32), block))
            with pytest.raises(ValueError, match=message):
                optimizer.apply(jnp.ones(state.moments[0].shape), state, params, 0.1)


def test_in_a_chain_of_optax():
    task = problem((3, 10, 7), (4, 3), steps=4)
    chain = optax.chain(
        optax.scale(0.5), masked_transformation(task.selection, optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    )
    params = jnp.asarray(task.params)
    state = chain.init(params)
    update = jax.jit(chain.update)
    expected, moments = task.params, [np.zeros(task.params.shape)] * 2
    for number, grad in enumerate(task.grads):
        updates, state = update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
        expected, moments = float64_steps(
            "adamw", expected, moments, [0.5 * grad], task.mask, rate=0.1 - 0.01 * number, first=1 + number,
            weight_decay=0.1,
        )  # fmt: skip
    np.testing.assert_allclose(params, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(params)[~task.mask], task.params[~task.mask])
    # bfloat16 parameters become, by way of a difference, what the masked update makes of them.
    narrow = jnp.asarray(task.params, jnp.bfloat16)
    transformation = masked_transformation(task.selection, 0.1, "sgd", seed=4)
    updates, _ = transformation.update(jnp.asarray(task.grads[0]), transformation.init(narrow), narrow)
    added = optax.apply_updates(narrow, updates)
    exact = narrow.astype(jnp.float32) - 0.1 * task.grads[0] * task.mask
    assert added.dtype == jnp.bfloat16
    np.testing.assert_allclose(added.astype(jnp.float32), exact, rtol=2.0**-7, atol=1e-6)
