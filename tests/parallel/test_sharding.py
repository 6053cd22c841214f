"""Logical axes on a mesh: for any shape the cut is even and no mesh axis is used twice."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxtune.models import DecoderConfig
from jaxtune.models.declarations import declare
from jaxtune.parallel import make_mesh, named_sharding, partition_spec, replicated
from jaxtune.parallel.sharding import RULES, constrain

SIZES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]


@st.composite
def arrays(draw):
    """Logical axes and a shape."""
    axes = draw(st.lists(st.sampled_from([None, *RULES]), max_size=4))
    return tuple(axes), tuple(draw(st.integers(1, 24)) for _ in axes)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SIZES), arrays())
def test_the_cut_is_even_and_follows_the_table(sizes, array):
    mesh, (axes, shape) = make_mesh(*sizes), array
    spec = partition_spec(axes, shape, mesh)
    assert len(spec) == len(shape)
    used = []
    for axis, size, entry in zip(axes, shape, spec, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        used += names
        assert set(names) <= set(RULES[axis] if axis else ())
        assert size % math.prod(mesh.shape[name] for name in names) == 0
        # An axis stays whole only where the table gives it nothing, or the size does not divide, or it is taken.
        if not names and axis and (free := [name for name in RULES[axis] if name not in used]):
            assert size % math.prod(mesh.shape[name] for name in free)
    assert len(used) == len(set(used))
    # And jax accepts it: the parts of all devices together hold the array once for each device that holds a copy.
    shard = named_sharding(axes, shape, mesh).shard_shape(shape)
    assert math.prod(shard) * math.prod(mesh.shape[name] for name in used) == math.prod(shape)


def test_an_axis_that_the_table_lacks_is_an_error():
    with pytest.raises(KeyError, match="embedd"):
        partition_spec(("embedd",), (4,), make_mesh(2, 2, 2))


def test_weights_of_a_model_are_cut_over_fsdp_and_tensor(mesh):
    """All large matrices are: a whole one on each device would undo what the mesh is for."""
    config = DecoderConfig("llama", 64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    for path, spec in declare(config).items():
        shard = named_sharding(spec.axes, spec.shape, mesh).shard_shape(spec.shape)
        if path.endswith((".kernel", ".table")):
            assert math.prod(shard) == spec.size // 4, path


def test_constrain_fixes_how_an_activation_is_cut(mesh):
    x = jnp.asarray(np.arange(8.0 * 4 * 6).reshape(8, 4, 6))

    @jax.jit
    def function(x):
        return constrain(2 * x, ("batch", None, "mlp"), mesh)

    result = function(x)
    assert result.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    np.testing.assert_array_equal(result, 2 * x)
    assert constrain(x, ("batch", None, None), None) is x
    assert constrain(x, ("batch", None, None), make_mesh(1, 1, 1, jax.devices()[:1])) is x


def test_replicated_is_whole_on_every_device(mesh):
    placed = jax.device_put(jnp.arange(6.0), replicated(mesh))
    assert len(placed.addressable_shards) == 8
    assert all(shard.data.shape == (6,) for shard in placed.addressable_shards)
