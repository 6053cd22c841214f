"""What the compiler is told beside the program: in one place for training, populations and generation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxtune.parallel.platform import platform

logger = logging.getLogger(__name__)

# XLA's own products of matrices instead of YNNPACK's, which jaxlib 0.10 prefers. On an AMD EPYC (family 25, model 17) a
# training step takes 0.89 times as long with them, as batched products, attention's, are half as fast again. On an
# Intel Xeon (family 6, model 207) it takes as long or longer, so that the choice is the processor's maker's.
_OWN_PRODUCTS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
_BY_MAKER = {"AuthenticAMD": _OWN_PRODUCTS}
_PROCESSOR = Path("/proc/cpuinfo")


def compiler_options(mesh: Mesh | None = None) -> dict[str, str | bool] | None:
    """The ``compiler_options`` of an outermost ``jax.jit`` on the mesh's devices; None where there are none.

    Accelerators have none. On a CPU they follow from the processor's maker alone, so that a machine always compiles the
    same program. An option is tried once in a process, and left out if this jaxlib does not know it. (In ``XLA_FLAGS``
    it would end the process.) A ``jax.jit`` inside another one must not have options.

    Args:
      mesh: what the program runs on; None for the device that jax uses by itself.
    """
    wanted = _BY_MAKER.get(_maker(), {}) if platform(mesh) == "cpu" else {}
    return _known(wanted) or None


def _known(options: Mapping[str, str | bool]) -> dict[str, str | bool]:
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: str | bool) -> bool:
    device = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    nothing = jax.jit(jnp.negative, compiler_options={name: value}, in_shardings=device)
    try:
        nothing.lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
    except jax.errors.JaxRuntimeError as error:
        logger.info("the compiler option %s is left out: %s", name, error)
        return False
    return True


@functools.cache
def _maker() -> str:
    """What the processor calls its maker, on Linux; empty elsewhere."""
    if not _PROCESSOR.exists():
        return ""
    lines = (line.partition(":") for line in _PROCESSOR.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")
