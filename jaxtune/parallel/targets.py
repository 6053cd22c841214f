"""Devices that are not here: compiling for a TPU slice or NVIDIA GPUs on a machine that has neither.

XLA's compilers for both come with packages from the package index (extra ``targets``); a compiled program tells what
memory it needs and that its kernels lower and fit. It tells nothing of speed, and it cannot be run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from jaxtune.errors import UserError, nearest

TPU_KINDS = ("v5e", "v5p", "v6e")

# What XLA's GPU compiler asks of a device: name, bytes of memory, bytes/s (NVIDIA's H100 and H200 data sheets). The
# rest of the description is common to the Hopper generation (CUDA programming guide, compute capability 9.0).
_GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 85_029_158_912, 3_350_000_000_000),
    "h200": ("NVIDIA H200", 150_754_820_096, 4_800_000_000_000),
}

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""


def target_devices(target: str) -> list[Any]:
    """The devices of a target, for meshes and shardings of programs that are compiled and not run.

    Args:
      target: ``KIND:AxB`` or ``KIND:AxBxC`` for a TPU slice (``v5e:4x4``, ``v5p:2x2x1``, ``v6e:2x4``), ``h100:N`` or
        ``h200:N`` for N GPUs of one host.

    Raises:
      UserError: the target is unknown, or the package with its compiler is not installed.
    """
    kind, _, shape = target.partition(":")
    if kind not in (*TPU_KINDS, *_GPUS):
        raise UserError(f"target {target!r}: unknown kind {kind!r}{nearest(kind, [*TPU_KINDS, *_GPUS])}")
    if not re.fullmatch(r"\d+(x\d+){1,2}" if kind in TPU_KINDS else r"[1-9]\d*", shape):
        example = f"{kind}:4x4" if kind in TPU_KINDS else f"{kind}:8"
        raise UserError(f"target {target!r}: its shape is written like {example!r}")
    package = "libtpu" if kind in TPU_KINDS else "jax_cuda13_plugin"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"target {target!r}: the package with its compiler is missing; pip install 'jaxtune[targets]'")
    try:
        if kind in TPU_KINDS:
            # Else libtpu looks for a metadata server, and two processes that compile at once stop at its lock.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            description = topologies.get_topology_desc(platform="tpu", topology_name=target)
        else:
            name, memory, bandwidth = _GPUS[kind]
            text = _HOPPER.format(name=name, memory=memory, bandwidth=bandwidth)
            description = topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=f"1x1x{shape}", target_config=text
            )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"target {target!r}: {error}") from error
    return list(description.devices)


def compile_for_target(function: Callable[..., Any], *arguments: Any, **options: Any) -> jax.stages.Compiled:
    """``function`` compiled for the devices that its arguments' shardings name.

    Args:
      function: what to compile; wrapped in :func:`jax.jit` with ``options``.
      arguments: ``jax.ShapeDtypeStruct``s with shardings over :func:`target_devices`.
      options: of :func:`jax.jit`.

    Raises:
      ValueError: no argument has a sharding.
    """
    devices = [d for leaf in jax.tree.leaves(arguments) if leaf.sharding is not None for d in leaf.sharding.device_set]
    if not devices:
        raise ValueError("no argument has a sharding over the devices of a target")
    platform = "cuda" if devices[0].platform == "gpu" else devices[0].platform
    with _device_in_context(devices):
        lowered = jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=(platform,))
    # What was compiled for a device that is not here can be written to the cache, but not read back.
    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    _use_compilation_cache(False)
    try:
        return lowered.compile()
    finally:
        _use_compilation_cache(cached)


def _device_in_context(devices: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Tells kernels of the one device that a program without a mesh is for: they would look for one that is here."""
    if len(set(devices)) > 1 or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    mesh = Mesh(np.array(devices[:1]), ("device",), axis_types=(AxisType.Auto,))
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _use_compilation_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    # jax looks at the setting once, unless it is told to look again.
    compilation_cache.reset_cache()
