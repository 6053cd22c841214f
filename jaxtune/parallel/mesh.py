"""The device mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxtune.errors import UserError

AXES = ("trial", "data", "fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None, *, trial: int = 1
) -> Mesh:
    """A mesh with axes ``trial``, ``data``, ``fsdp`` and ``tensor`` over all devices.

    The axes are ``AxisType.Auto``: the compiler partitions, and only the places that need a say constrain it.

    Args:
      data: replicas of the model, each with its own rows.
      fsdp: shards of the weights, each with its own rows as well.
      tensor: shards of every layer's matrices.
      devices: the devices to use (jax.Device); all of them if None.
      trial: parts of a population, each with a copy of the model and its own trials.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = {"trial": trial, "data": data, "fsdp": fsdp, "tensor": tensor}
    wrong = [f"parallel.{axis} = {size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong:
        raise UserError(f"{wrong[0]}: a mesh axis is a positive number, or -1 for the devices that are left")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"parallel: only one axis may be -1, not {' and '.join(open_axes)}")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if open_axes:
        sizes[open_axes[0]] = len(available) // fixed
    if int(np.prod(list(sizes.values()))) != len(available):
        given = {"trial": trial, "data": data, "fsdp": fsdp, "tensor": tensor}
        shape = " × ".join(f"{axis} {size}" for axis, size in given.items() if axis != "trial" or size != 1)
        raise UserError(
            f"parallel: a mesh of {shape} does not fit {len(available)} "
            f"{'device' if len(available) == 1 else 'devices'}; the axes must multiply to that number"
        )
    if devices is None:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    grid = np.array(available, dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
