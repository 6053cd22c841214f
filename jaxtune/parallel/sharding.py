"""Logical axes to mesh axes: the one table, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "trials": ("trial",),
    "batch": ("data", "fsdp"),
    "replicas": ("data",),
    "sequence": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "rank": (),
    "head_dim": (),
}
"""Mesh axes that each logical axis is cut over. Activations name ``batch`` and leave ``embed`` whole; ``replicas`` are
the rows of a batch whose width is still cut."""

TRIAL_AXIS = RULES["trials"][0]
"""The mesh axis that the trials of a population are spread over."""


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array of ``shape`` with logical ``axes`` is cut over ``mesh``.

    A mesh axis is used once, by the first logical axis that wants it; an axis whose size the mesh axis does not divide
    stays whole (two key-value heads over four devices).

    Args:
      axes: one logical name for each dimension, None for a dimension that is never cut.
      shape: the array's shape.
      mesh: the mesh.

    Raises:
      KeyError: a logical axis that :data:`RULES` does not know.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for an array of shape {tuple(shape)}")
    used: set[str] = set()
    entries: list[tuple[str, ...] | str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        wanted = [name for name in RULES[axis] if name in mesh.shape and name not in used] if axis else []
        if not wanted or size % math.prod(mesh.shape[name] for name in wanted):
            entries.append(None)
            continue
        used.update(wanted)
        entries.append(wanted[0] if len(wanted) == 1 else tuple(wanted))
    return PartitionSpec(*entries)


def named_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """:func:`partition_spec` as a sharding over ``mesh``."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def cut_axes(axes: Sequence[str | None]) -> dict[int, tuple[str, ...]]:
    """Mesh axes over which the dimensions of an array with these logical axes may be cut, by number."""
    return {dimension: RULES[axis] for dimension, axis in enumerate(axes) if axis and RULES[axis]}


def projection_axes(inputs: str | None, outputs: str | None) -> dict[str, tuple[str, ...]]:
    """Mesh axes over which the rows, inputs and outputs of a linear layer's activations are cut.

    Args:
      inputs: logical axis of the kernel's inputs; activations leave ``embed`` whole.
      outputs: that of its outputs.
    """
    return {
        "trials": RULES["trials"],
        "rows": RULES["batch"],
        **{
            name: () if axis in (None, "embed") else RULES[axis]
            for name, axis in (("inputs", inputs), ("outputs", outputs))
        },
    }


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """Fixes how an activation is cut, inside ``jax.jit``; returns ``x`` itself when there is no mesh."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(axes, x.shape, mesh))


def place(array: Any, axes: Sequence[str | None], mesh: Mesh) -> jax.Array:
    """A host array, the same in every process, cut over the mesh; each process uploads what its own devices hold.

    Args:
      array: of any kind that NumPy takes, or on a device of this process.
      axes: one logical name for each dimension.
      mesh: the mesh.
    """
    sharding = named_sharding(axes, np.shape(array), mesh)
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
