"""Pallas' interpreter of Mosaic-GPU kernels, as strict as it can be.

The interpreter runs the kernel's own body: warpgroups as threads, barriers, copies by TMA, ``wgmma``. All uninitialised
memory, the outputs and shared memory too, holds NaN (the largest value, for integers). Copies and plain accesses of
shared memory that no barrier orders are an error, and from jax 0.11 on those that no proxy fence orders as well.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.core import eval_jaxpr
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode


class _CompileOnce:
    """Runs the body of a kernel, which the interpreter itself compiles again for each warpgroup of each block."""

    def __init__(self):
        self._programs: dict[int, tuple[object, jax.stages.Compiled]] = {}
        self._lock = threading.Lock()

    def __call__(self, jaxpr, consts, *args):
        with self._lock:
            if id(jaxpr) not in self._programs:
                program = jax.jit(lambda consts, *args: eval_jaxpr(jaxpr, consts, *args) and None)
                self._programs[id(jaxpr)] = jaxpr, program.lower(consts, *args).compile()
        self._programs[id(jaxpr)][1](consts, *args)


def _wgmma(*, a_allocation_key_as_array, a_transforms, original=gpu_callbacks.wgmma, **rest):
    """``wgmma``, whose left operand may lie in registers."""
    a = np.asarray(a_allocation_key_as_array)
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return original(a_allocation_key_as_array=a, a_transforms=a_transforms, **rest)
    memory = gpu_callbacks._get_shared_memory()

    def place(operand):
        key = gpu_callbacks.HostAllocationKey.from_array(rest[f"{operand}_allocation_key_as_array"])
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(rest[f"{operand}_transforms"]))
        return key, memory.access(key, transforms)

    b, _, _ = memory.get_buffer_content(*place("b"), rest["thread"])
    accumulator, _, _ = memory.get_buffer_content(*place("acc"), rest["thread"])
    product = np.matmul(a, b, dtype=accumulator.dtype)
    memory.store_buffer_content(*place("acc"), accumulator + product, rest["thread"])
    return rest["token"]


def _additions():
    if not hasattr(gpu_callbacks, "DeviceLocalMemoryTransfer"):
        return ((gpu_callbacks, "wgmma", _wgmma),)
    from tests.kernels.hopper_interpreter_additions import ADDITIONS

    return ADDITIONS


@contextlib.contextmanager
def hopper_interpreter() -> Iterator[None]:
    """Within it, Mosaic-GPU kernels that are traced run on the CPU."""
    with contextlib.ExitStack() as stack:
        for owner, name, function in (*_additions(), (thread_map, "_run_jaxpr", _CompileOnce())):
            stack.enter_context(mock.patch.object(owner, name, function))
        parameters = InterpretGPUParams(uninitialized_memory="nan", detect_races=True)
        stack.enter_context(force_gpu_interpret_mode(parameters))
        try:
            yield
            assert not interpret_pallas_call.get_races().races_found, "a barrier or a fence is missing"
        except BaseException:
            # A kernel that failed leaves its memory behind, and the next one would trip over it.
            interpret_pallas_call.reset_gpu_interpret_mode_state()
            raise
