"""Compiling for devices that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import UserError
from jaxtune.parallel.targets import compile_for_target, target_devices


@pytest.mark.parametrize(("target", "count", "kind"), [("v5e:2x2", 4, "TPU v5 lite"), ("h200:8", 8, "NVIDIA H200")])
def test_a_sharded_matmul_compiles_and_tells_its_memory(target: str, count: int, kind: str) -> None:
    devices = target_devices(target)
    assert [device.device_kind for device in devices] == [kind] * count
    mesh = Mesh(np.array(devices), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=rows)
    w = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    memory = compile_for_target(lambda x, w: x @ w, x, w, out_shardings=rows).memory_analysis()
    assert memory.argument_size_in_bytes == (1024 // count * 512 + 512 * 256) * 2
    assert memory.output_size_in_bytes == 1024 // count * 256 * 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("v5:2x2", "unknown kind 'v5'.*v5e"),
        ("v5e:four", "written like 'v5e:4x4'"),
        ("h200:0", "written like 'h200:8'"),
        ("v5e:99x99", "v5e:99x99"),
    ],
)
def test_a_wrong_target_is_named(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        target_devices(target)


def test_arguments_without_a_target_are_refused() -> None:
    with pytest.raises(ValueError, match="no argument has a sharding"):
        compile_for_target(jnp.sin, jax.ShapeDtypeStruct((2,), jnp.float32))
