"""Arrays whose types tell of a mesh, inside shard_map with its checks and over explicit axes; and whose kernel runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import low_rank_matmul

from jaxtune.parallel.targets import compile_for_target, target_devices
from tests.kernels.masked_update.compiled import kernels

ROWS, INPUTS, OUTPUTS, RANK = 8, 24, 16, 4
AXES = {"rows": ("data",), "outputs": ("tensor",)}


@pytest.fixture(autouse=True)
def interpreted(request):
    """Kernels are interpreted, but for those that are compiled for a TPU."""
    if "compile" in request.node.name:
        yield
        return
    with pltpu.force_tpu_interpret_mode(True):  # pyright: ignore[reportArgumentType]
        yield


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    shapes = [(ROWS, INPUTS), (INPUTS, OUTPUTS), (INPUTS, RANK), (RANK, OUTPUTS), (OUTPUTS,)]
    return tuple(jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)


def _gradients(x, w, a, b, bias, rows, implementation, axes=None):
    """The sum of squares of a layer, and its gradients."""

    def loss(x, w, a, b, bias, scale):
        y = low_rank_matmul(
            x, w, a, b, scale, bias=bias, dropout_rate=0.3, dropout_seed=3, rows=rows,
            implementation=implementation, axes=axes,
        )  # fmt: skip
        return jnp.sum(y**2)

    return jax.value_and_grad(loss, argnums=tuple(range(6)))(x, w, a, b, bias, jnp.float32(0.7))


@pytest.fixture(scope="module")
def expected(arrays):
    return _gradients(*arrays, jnp.arange(ROWS, dtype=jnp.uint32), "reference")


def _close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def _over_rows(implementation):
    """The gradients on each device's rows, in which those of what is not cut are summed over devices by themselves."""

    def step(x, w, a, b, bias, rows):
        loss, gradients = _gradients(x, w, a, b, bias, rows, implementation)
        return jax.lax.psum(loss, "data"), gradients

    cut = (P("data"), P(), P(), P(), P(), P("data"))
    return jax.shard_map(step, in_specs=cut, out_specs=(P(), (P("data"), P(), P(), P(), P(), P())))


def test_inside_a_shard_map_that_checks(arrays, expected, mesh):
    with jax.set_mesh(mesh):
        _close(jax.jit(_over_rows("xla"))(*arrays, jnp.arange(ROWS, dtype=jnp.uint32)), expected)


def test_the_kernel_compiles_inside_a_shard_map_that_checks():
    # jax's interpreter of kernels does not run there, so this one is compiled.
    mesh = Mesh(np.array(target_devices("v5e:2x2")), ("data",), axis_types=(AxisType.Auto,))
    shapes = [(512, 256), (256, 128), (256, RANK), (RANK, 128), (128,)]
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P() if number else P("data")))
        for number, shape in enumerate(shapes)
    ]
    arguments.append(jax.ShapeDtypeStruct((512,), jnp.uint32, sharding=NamedSharding(mesh, P("data"))))
    with jax.set_mesh(mesh):
        text = compile_for_target(_over_rows("tpu"), *arguments).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(("implementation", "in_context"), [("xla", False), ("tpu", True)])
def test_over_explicit_axes(arrays, expected, implementation, in_context):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    specs = [P("data"), P(None, "tensor"), P(), P(None, "tensor"), P("tensor")]
    placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip(arrays, specs, strict=True)]
    rows = jnp.arange(ROWS, dtype=jnp.uint32)

    def run():
        return jax.jit(lambda *operands: _gradients(*operands, rows, implementation, AXES))(*placed)

    if not in_context:
        found = run()
    else:
        with jax.set_mesh(mesh):
            found = run()
            y = low_rank_matmul(*placed[:4], 1.0, implementation=implementation, axes=AXES)
        assert y.sharding.spec == P("data", "tensor")
    _close(found, expected)
    for gradient, spec in zip(found[1], specs, strict=False):
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_population_over_explicit_axes(arrays):
    x, w, a, b, _ = arrays
    trials = [jnp.stack([v, 2 * v]) for v in (x, a, b)]

    def gradients(implementation):
        def loss(x, w, a, b):
            return jnp.sum(low_rank_matmul(x, w, a, b, 0.5, implementation=implementation, axes=AXES) ** 2)

        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 2, 3)), in_axes=(0, None, 0, 0)))

    theirs = gradients("reference")(trials[0], w, *trials[1:])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    specs = [P(None, "data"), P(None, "tensor"), P(), P(None, None, "tensor")]
    operands = (trials[0], w, *trials[1:])
    with jax.set_mesh(mesh):
        placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip(operands, specs, strict=True)]
        _close(gradients("tpu")(*placed), theirs)


def _layer(x, w, a, b):
    return low_rank_matmul(x, w, a, b, 1.0, axes={})


_SHAPES = [(4096, 1024), (1024, 1024), (1024, 16), (16, 1024)]


@pytest.mark.skipif(jax.device_count() == 1, reason="needs a host of several devices")
def test_a_mesh_of_one_device_of_several_compiles_with_its_kernel():
    device = Mesh(np.array(target_devices("v5e:2x2")[:1]), ("data",), axis_types=(AxisType.Auto,))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(device, P())) for shape in _SHAPES]
    with jax.set_mesh(device):
        text = compile_for_target(_layer, *arguments).as_text()
    assert "tpu_custom_call" in text


@pytest.mark.parametrize(("here", "target", "launches"), [("cpu", "tpu", 1), ("tpu", "cpu", 0)])
def test_the_mesh_tells_the_platform_and_not_the_backend(monkeypatch, here, target, launches):
    devices = target_devices("v5e:2x2") if target == "tpu" else jax.devices()
    mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in _SHAPES]
    monkeypatch.setattr(jax, "default_backend", lambda: here)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert len(kernels(jax.make_jaxpr(_layer)(*arguments).jaxpr)) == launches
