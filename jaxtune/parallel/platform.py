"""What differs between CPU, GPU and TPU, in one place."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from jaxtune.errors import UserError
from jaxtune.files import cache_directory
from jaxtune.parallel.host_memory import host_free_bytes

# Peak dense bfloat16 matrix throughput in FLOP/s, by a part of jax's device_kind, the longer name before one that it
# holds. Sources: the vendors' data sheets.
_PEAK_FLOPS = {
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v4": 275e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


# NVIDIA's, those of its Jetson boards, of Windows' Linux, of AMD, and of TPUs.
_DEVICE_FILES = ("nvidia[0-9]*", "nvmap", "dxg", "kfd", "accel*", "vfio/[0-9]*")


def compute_dtype(name: str = "auto", mesh: jax.sharding.Mesh | None = None) -> jnp.dtype:
    """The dtype of activations and frozen weights.

    Args:
      name: ``"float32"``, ``"bfloat16"`` or ``"auto"``: bfloat16 on accelerators, float32 on CPU, where bfloat16 matrix
        products are emulated and very slow.
      mesh: of the devices; None for those that jax uses by itself.
    """
    if name == "auto":
        name = "float32" if platform(mesh) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Peak bfloat16 FLOP/s of a device by its data sheet, or None where none is known (CPUs)."""
    return _peak_of_kind((device or jax.devices()[0]).device_kind)


def _peak_of_kind(kind: str) -> float | None:
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in kind), None)


def leave_out_absent_accelerators() -> None:
    """Tells jax to use the CPU alone where Linux has no device file of any accelerator; before jax is used.

    jax starts every plugin that is installed, also one that is there for its compiler alone (the extra ``targets``),
    and these complain at length where their hardware is missing. A choice of the user's (``JAX_PLATFORMS``) stays.
    """
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if chosen or sys.platform != "linux":
        return
    if not any(any(Path("/dev").glob(pattern)) for pattern in _DEVICE_FILES):
        jax.config.update("jax_platforms", "cpu")


def cpu_alone() -> bool:
    """Whether jax was told to use no accelerator, by the user or for want of one; starts nothing."""
    return jax.config.jax_platforms == "cpu"  # pyright: ignore[reportAttributeAccessIssue]


def platform(mesh: jax.sharding.Mesh | None = None) -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the mesh's devices, or the one that jax uses by itself."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def check_kernels(kernels: str, mesh: jax.sharding.Mesh) -> None:
    """Refuses Pallas kernels on a mesh whose devices have none.

    Raises:
      UserError: ``kernels`` is ``"pallas"``, and the devices are neither TPUs nor GPUs of the Hopper generation.
    """
    device = mesh.devices.flat[0]
    capability = getattr(device, "compute_capability", "")
    if kernels == "pallas" and platform(mesh) != "tpu" and not str(capability).startswith("9."):
        raise UserError(
            f"kernels: 'pallas' needs TPUs or GPUs of the Hopper generation, not {device.device_kind!r}; "
            "choose 'auto' or 'xla'"
        )


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next process with the same shapes does not compile again.

    The directory is ``$JAX_COMPILATION_CACHE_DIR``, or ``xla`` in :func:`jaxtune.files.cache_directory`.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Of glibc's malloc.h: from which size memory is given back, how many blocks are mapped by themselves, how many heaps.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells the C library to keep what is freed for the next allocation, on Linux; before jax starts its threads.

    For whoever computes on the CPU: what an accelerator's program takes is not the C library's.

    XLA allocates the temporary arrays of a program anew at each run. glibc maps blocks of their size from the system
    and gives them back, so that each step finds its memory unmapped, and one thread after the other waits while the
    system fills pages with zeros: for a step of 0.75 GB that are 185,000 page faults and a tenth of its time. The
    process does not shrink any more, and its peak may grow by what lies between blocks. Other C libraries are left
    as they are.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        # One heap, as the others are too small for such blocks, which are then mapped all the same.
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
            library.mallopt(parameter, value)


def device_memory_peak() -> int | None:
    """Most bytes in use so far on the first local device, or None where the backend does not tell (CPU)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics.get("peak_bytes_in_use")


def memory_bytes(mesh: jax.sharding.Mesh) -> float | None:
    """Memory that programs may fill on each device of the mesh; None where the platform does not say.

    A CPU knows no limit of its own: its devices share the machine's memory.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return psutil.virtual_memory().total / len(jax.local_devices())
    return (device.memory_stats() or {}).get("bytes_limit")


def free_bytes(mesh: jax.sharding.Mesh) -> float | int | None:
    """Bytes that may be filled on each of the mesh's devices of this process; None where the platform does not say.

    Of an accelerator it is what jax may use in all, what it holds already among it. The devices of a CPU share what
    the machine has available now; what is decided once for a whole study goes by :func:`memory_bytes`, which does not
    depend on the moment.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if platform(mesh) == "cpu":
        return host_free_bytes() / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit")
