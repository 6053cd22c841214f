"""The kernels compiled for machines that are not here: in place, one launch, bytes by the selected share."""

from __future__ import annotations

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from jaxtune_kernels import Selection, masked_update
from jaxtune_kernels.masked_update import gpu

from jaxtune.parallel.targets import compile_for_target, target_devices
from tests.kernels.masked_update.compiled import bytes_copied_by_grid, check_in_place, compile_update, kernels


def _need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize(
    ("target", "package", "dtype", "cut"),
    [
        ("v5e:2x4", "libtpu", "float32", None),
        ("v5e:2x4", "libtpu", "bfloat16", 1),
        ("h200:1", "jax_cuda13_plugin", "float32", None),
        ("h200:8", "jax_cuda13_plugin", "bfloat16", 1),
    ],
)
def test_compiles_in_place(target, package, dtype, cut):
    _need(package)
    compiled, held, _ = compile_update(target, (8, 1024, 4096), (None, None), 4, dtype, dtype, cut)
    check_in_place(compiled, held, target)


def test_xla_scatters_in_place_on_gpus():
    _need("jax_cuda13_plugin")
    compiled, held, _ = compile_update(
        "h200:1", (1024, 4096), (128, None), 2, "float32", "float32", implementation="xla"
    )
    assert not re.findall(r"= f32\[(?:1,)*1024,4096\]\S* copy\(", compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    # The new values of the selected blocks.
    assert memory.temp_size_in_bytes <= 1.1 * 2 * 128 * 4096 * 4


@pytest.mark.parametrize(("target", "package"), [("v5e:2x4", "libtpu"), ("h200:1", "jax_cuda13_plugin")])
def test_a_population_compiles_in_place(target, package):
    """Four trials in one launch, on the place of all four."""
    _need(package)
    sharding = SingleDeviceSharding(target_devices(target)[0])
    optimizer, trials = masked_update(), 4
    struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((trials, *shape), dtype, sharding=sharding)  # noqa: E731
    params, selection = struct(8, 256, 1024), Selection(struct(3, dtype=jnp.int32))
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(jax.vmap(optimizer.init), params, selection),
    )

    def step(params, state, grads, rate):
        return jax.vmap(optimizer.apply)(grads, state, params, rate)

    grads = struct(3, 256, 1024)
    compiled = compile_for_target(step, params, state, grads, struct(), donate_argnums=(0, 1))
    check_in_place(compiled, trials * 256 * 1024 * 4 * (8 + 2 * 3), target)


def test_blocks_that_tpus_cannot_address_are_left_to_xla():
    _need("libtpu")
    compiled, _, _ = compile_update("v5e:2x4", (64, 256), (4, None), 3, "float32", "float32")
    assert "tpu_custom_call" not in compiled.as_text()
    with pytest.raises(ValueError, match="rows must be a multiple of 8, or all 64"):
        compile_update("v5e:2x4", (64, 256), (4, None), 3, "float32", "float32", implementation="tpu")


@pytest.mark.parametrize("block", [(128, None), (None, 256), (128, 256)])
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_bytes_follow_the_selected_share(implementation, block):
    """Counted from the grid, of which XLA's own cost analysis knows nothing."""
    shape = (1024, 2048)
    of_block = [whole if part is None else part for part, whole in zip(block, shape, strict=True)]
    optimizer = masked_update(implementation=implementation, moment_dtype=jnp.bfloat16)
    for share in (0.25, 0.5, 1.0):
        count = round(share * math.prod(shape) / math.prod(of_block))
        params = jax.ShapeDtypeStruct(shape, jnp.float32)
        selection = Selection(jax.ShapeDtypeStruct((count,), jnp.int32), block)
        state = jax.eval_shape(optimizer.init, params, selection)
        grads = jax.ShapeDtypeStruct(state.moments[0].shape, jnp.float32)
        jaxpr = jax.make_jaxpr(lambda *a: optimizer.apply(*a, 0.1, seed=0))(grads, state, params).jaxpr
        elements = share * math.prod(shape)
        if implementation == "tpu":
            # Parameters and moments in and out, gradients in.
            assert bytes_copied_by_grid(jaxpr) == elements * (3 * 4 + 4 * 2)
        else:
            (launch,) = kernels(jaxpr)
            assert math.prod(launch.params["grid_mapping"].grid) * gpu._TILE_ELEMENTS == elements
