"""The linear cross-entropy under jax's transformations, on a mesh, and what it costs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import linear_cross_entropy
from jaxtune_kernels.linear_cross_entropy.blocks import Axes, _ordered
from jaxtune_kernels.linear_cross_entropy.xla import block_rows

from tests.kernels.linear_cross_entropy.oracle import problem

OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 5.0}


def objective(made, implementation="xla", **options):
    """The weighted mean that a trainer minimises, as a function of hidden, head and low_rank."""

    def function(hidden, head, low_rank=made.low_rank):
        losses = linear_cross_entropy(
            hidden, head, made.targets, made.weights,
            low_rank=low_rank, implementation=implementation, **{**OPTIONS, **options},
        )  # fmt: skip
        return jnp.sum(losses * made.weights) / jnp.sum(made.weights)

    return function


def primitives(jaxpr, name):
    """All equations of one primitive, in inner programs too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            found.append(equation)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += primitives(inner, name)
    return found


def close(actual, expected, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def test_matmuls_are_those_of_the_gradients_asked_for():
    made = problem((12,), 8, 10)

    def matmuls(function):
        return len(primitives(jax.make_jaxpr(function)(made.hidden, made.head).jaxpr, "dot_general"))

    loss = objective(made, block=4)
    assert matmuls(loss) == 1
    assert matmuls(jax.grad(loss)) == 2  # a frozen head costs nothing, traced or compiled
    assert matmuls(jax.grad(loss, argnums=1)) == 3
    assert matmuls(jax.grad(loss, argnums=(0, 1))) == 4
    # Also from within a jit and a scan, which must pass on that the head is frozen.
    assert matmuls(jax.grad(lambda hidden, head: jax.jit(loss)(hidden, head))) == 2

    def scanned(hidden, head):
        return jax.lax.scan(lambda total, _: (total + loss(hidden, head), None), 0.0, None, length=2)[0]

    assert matmuls(jax.grad(scanned)) == 2


@pytest.mark.parametrize("weighted", [0, 1, 8, 9, 30])
def test_only_blocks_with_rows_that_count_are_processed(weighted):
    weights = np.zeros(30, np.float32)
    weights[np.random.default_rng(0).permutation(30)[:weighted]] = 0.5
    order = _ordered(jnp.asarray(weights), 8, Axes())
    assert int(order.blocks) == -(-weighted // 8)
    assert set(np.asarray(order.rows)[:weighted]) == set(np.flatnonzero(weights))
    assert np.array_equal(np.asarray(order.rows)[np.asarray(order.places)], np.arange(30))


@pytest.mark.parametrize("trained", ["hidden", "low_rank", "head"])
def test_a_population_under_vmap(trained):
    made = problem((3, 7), 8, 11, rank=2, seed=4)
    trials = 3
    generator = np.random.default_rng(1)

    def varied(array):
        return jnp.asarray(array[None] + 0.3 * generator.standard_normal((trials, *array.shape)), jnp.float32)

    smoothing = jnp.asarray([0.0, 0.1, 0.3])
    weights = jnp.asarray(generator.random((trials, 3, 7)) * (generator.random((trials, 3, 7)) < 0.6), jnp.float32)
    hidden = varied(made.hidden)
    head, head_axis = (varied(made.head), 0) if trained == "head" else (made.head, None)
    low_rank, rank_axis = made.low_rank, None
    if trained == "low_rank":
        low_rank, rank_axis = jax.tree.map(varied, low_rank), 0

    def both(implementation):
        def gradients(hidden, head, low_rank, smoothing, weights):
            loss = objective(made._replace(weights=weights), implementation, block=4, label_smoothing=smoothing)
            return jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, head, low_rank)

        return gradients

    arguments = hidden, head, low_rank, smoothing, weights
    mapped = jax.jit(jax.vmap(both("xla"), in_axes=(0, head_axis, rank_axis, 0, 0)))(*arguments)
    for trial in range(trials):
        axes = (0, head_axis, rank_axis, 0, 0)
        own = [
            value if axis is None else jax.tree.map(lambda leaf: leaf[trial], value)  # noqa: B023
            for value, axis in zip(arguments, axes, strict=True)
        ]
        close(jax.tree.map(lambda leaf: leaf[trial], mapped), both("reference")(*own))  # noqa: B023


def test_a_population_on_one_head_is_one_loop_over_plain_matmuls():
    made = problem((16,), 8, 10)
    hidden = jnp.stack([made.hidden] * 3)
    gradient = jax.vmap(jax.grad(objective(made, block=8)), in_axes=(0, None))
    jaxpr = jax.make_jaxpr(gradient)(hidden, made.head).jaxpr
    assert len(primitives(jaxpr, "while")) == 1
    assert not primitives(jaxpr, "scan")
    shapes = [equation.outvars[0].aval.shape for equation in primitives(jaxpr, "dot_general")]
    assert shapes == [(8, 10), (8, 8)]  # neither has an axis of trials


def test_inside_a_scan_with_remat():
    made = problem((10,), 8, 11, seed=2)
    xs = jnp.stack([made.hidden, 2 * made.hidden])

    def total(head, implementation):
        body = jax.checkpoint(lambda carry, x: (carry + objective(made, implementation)(x, head), None))
        return jax.lax.scan(body, jnp.float32(0.0), xs)[0]

    close(*(jax.jit(jax.value_and_grad(lambda head, i=i: total(head, i)))(made.head) for i in ("xla", "reference")))


def test_derivatives_of_the_derivative():
    made = problem((9,), 6, 7, rank=2, seed=8)

    def curvature(hidden, head, low_rank, implementation):
        loss = objective(made, implementation, block=4)
        slopes = jax.grad(loss, argnums=(0, 1, 2))(hidden, head, low_rank)
        return sum(jnp.sum(jnp.sin(30 * leaf)) for leaf in jax.tree.leaves(slopes))

    operands = made.hidden, made.head, made.low_rank
    ours, theirs = (
        jax.jit(jax.grad(lambda *each, i=i: curvature(*each, i), argnums=(0, 1, 2)))(*operands)
        for i in ("xla", "reference")
    )
    close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(theirs)) > 0.1


def test_a_loss_that_is_not_used_has_no_gradient():
    made = problem((6,), 4, 5)

    def function(hidden):
        losses = linear_cross_entropy(hidden, made.head, made.targets, made.weights)
        return losses, jnp.sum(hidden)

    _, pullback = jax.vjp(function, made.hidden)
    np.testing.assert_array_equal(pullback((jnp.zeros(6), jnp.float32(1.0)))[0], np.ones_like(made.hidden))


SPECS = [P(("data", "fsdp")), P(None, "tensor")]
ON_MESH = {"row_axes": ("data", "fsdp"), "vocabulary_axis": "tensor"}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(("rows", "vocabulary"), [((8, 5), 24), ((6, 5), 23)], ids=["cut", "not divisible"])
def test_on_eight_devices(mesh, rows, vocabulary):
    made = problem(rows, 8, vocabulary, rank=2, seed=5)
    # Devices have different numbers of rows that count, one of them none.
    made = made._replace(weights=made.weights.at[:2].set(0.0).at[-2:].set(1.0))
    sharded = jax.jit(jax.value_and_grad(objective(made, block=3, mesh=mesh, **ON_MESH), argnums=(0, 1, 2)))
    plain = jax.jit(jax.value_and_grad(objective(made, "reference"), argnums=(0, 1, 2)))
    close(sharded(made.hidden, made.head, made.low_rank), plain(made.hidden, made.head, made.low_rank))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_neither_rows_nor_the_head_are_gathered(mesh):
    made = problem((8, 5), 8, 24)
    operands = zip((made.hidden, made.head), SPECS, strict=True)
    hidden, head = (jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in operands)
    loss = objective(made, block=3, mesh=mesh, **ON_MESH)
    shardings = NamedSharding(mesh, P()), tuple(NamedSharding(mesh, spec) for spec in SPECS)
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=shardings)
    text = function.lower(hidden, head).compile().as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_arrays_whose_types_tell_of_the_mesh(mesh, implementation):
    """Inside shard_map with its checks, and over explicit axes, with the mesh as an argument and without."""
    made = problem((8,), 8, 24, rank=2, seed=7)

    def gradients(hidden, head, low_rank, targets, weights, **options):
        def loss(hidden, head, low_rank):
            losses = linear_cross_entropy(
                hidden, head, targets, weights, low_rank=low_rank, implementation=implementation, block=1, **options
            )
            return jnp.sum(losses * weights)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, head, low_rank)

    operands = made.hidden, made.head, made.low_rank, made.targets, made.weights
    expected = gradients(*operands)
    rows = P(("data", "fsdp"))
    specs = rows, P(), (rows, P())

    def step(*operands):
        loss, found = gradients(*operands)
        return jax.lax.psum(loss, ("data", "fsdp")), found

    with jax.set_mesh(mesh):
        checked = jax.shard_map(step, in_specs=(*specs, rows, rows), out_specs=(P(), specs))
        close(jax.jit(checked)(*operands), expected)

    explicit = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    rows = NamedSharding(explicit, P("data"))
    columns = NamedSharding(explicit, P(None, "tensor"))
    placed = jax.device_put(operands, (rows, columns, (rows, columns), rows, rows))
    with jax.set_mesh(explicit):
        for options in ({}, {"mesh": explicit, "row_axes": ("data",), "vocabulary_axis": "tensor"}):
            close(jax.jit(lambda *each, options=options: gradients(*each, **options))(*placed), expected)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_population_on_eight_devices(mesh):
    made = problem((8, 5), 8, 24, seed=6)
    hidden = jnp.stack([made.hidden, 2 * made.hidden])
    gradients = [
        jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(0, None)))(hidden, made.head)
        for loss in (objective(made, block=3, mesh=mesh, **ON_MESH), objective(made, "reference"))
    ]
    close(*gradients)


@pytest.mark.parametrize("argnums", [0, (0, 1)], ids=["frozen head", "trained head"])
def test_memory_is_far_below_that_of_the_logits(argnums):
    rows, d, vocabulary = 4096, 16, 32768
    shapes = [((rows, d), "float32"), ((d, vocabulary), "float32"), ((rows,), "int32"), ((rows,), "float32")]
    abstract = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def temporaries(implementation):
        def loss(hidden, head, targets, weights):
            return linear_cross_entropy(hidden, head, targets, weights, implementation=implementation).sum()

        compiled = jax.jit(jax.grad(loss, argnums=argnums)).lower(*abstract).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = rows * vocabulary * 4
    assert temporaries("reference") >= logits
    assert temporaries("xla") < logits / 16


@pytest.mark.parametrize(
    ("rows", "vocabulary", "platform", "block"),
    [
        (8192, 128256, "tpu", 1024),
        (8192, 256000, "gpu", 512),
        (2048, 32000, "tpu", 512),
        (300, 128256, "gpu", 300),
        (2048, 8192, "cpu", 256),
        (8192, 128256, "cpu", 64),
        (5, 48, "cpu", 5),
    ],
)
def test_rows_of_a_block(rows, vocabulary, platform, block):
    assert block_rows(rows, vocabulary, platform) == block
