"""What jax 0.10's interpreter of Mosaic-GPU kernels lacks of a Hopper GPU; newer ones have it.

- TMA fills with zeros what it reads beyond an array's edge and drops what it writes there. A plain load beyond the edge
  stays an error, as it is on the hardware.
- An operand of ``wgmma`` may be a transposed view of shared memory, and the left one may lie in registers.
- ``plgpu.load``.
"""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.primitives import load_p
from jax._src.state.indexing import NDIndexer
from jax._src.state.primitives import get_p
from jax._src.state.types import TransposeTransform

_in_transfer = threading.local()


def _execute(self, token, original=gpu_callbacks.DeviceLocalMemoryTransfer.execute):
    _in_transfer.active = True
    try:
        return original(self, token)
    finally:
        _in_transfer.active = False


def _read_beyond_the_edge(ret, full_read_shape, shape, dtype, *rest, original=gpu_callbacks._handle_out_of_bounds_read):
    if not getattr(_in_transfer, "active", False):
        return original(ret, full_read_shape, shape, dtype, *rest)
    filled = np.zeros(full_read_shape, dtype)
    if ret is not None:
        filled[tuple(slice(size) for size in ret.shape)] = ret
    return filled


def _memory(device_id, thread_id, grid_point_coords, source_info):
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))
    logging = utils.GPULoggingInfo(
        device_id=int(device_id),
        grid_point_coords=tuple(int(i) for i in grid_point_coords),
        thread_id=int(thread_id),
        source_info=source_info,
    )
    return memory, thread, logging


def _copy_smem_to_gmem(
    *, token, device_id, grid_point_coords, thread_id, src_allocation_key_as_array, src_transforms,
    dst_allocation_key_as_array, dst_transforms, predicate, source_info, commit_group, reduction_op,
):  # fmt: skip
    del commit_group
    assert predicate is None
    assert reduction_op is None
    memory, thread, logging = _memory(device_id, thread_id, grid_point_coords, source_info)
    source, target = (
        utils.to_range(jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
        for transforms in (src_transforms, dst_transforms)
    )
    key = gpu_callbacks.HostAllocationKey.from_array
    value, _, _ = memory.get_buffer_content(key(src_allocation_key_as_array), source, thread, logging_info=logging)
    _, (shape, _), _ = memory.get_buffer_content(key(dst_allocation_key_as_array), (), thread, logging_info=logging)
    target = target + tuple(slice(0, size, 1) for size in shape[len(target) :])
    clipped = utils.clip_range_to_shape(target, shape)
    if clipped is not None:
        sizes = [(r.stop - r.start) for r in clipped if isinstance(r, slice)]
        inside = value[tuple(slice(size) for size in sizes)]
        memory.store_buffer_content(key(dst_allocation_key_as_array), clipped, inside, thread, logging_info=logging)
    return token


def _operand(memory, thread, logging, allocation, transforms):
    if jnp.issubdtype(allocation.dtype, jnp.floating):
        return np.asarray(allocation)  # in registers
    transforms = list(gpu_callbacks._remove_noop_transforms(transforms))
    transposed = [t for t in transforms if isinstance(t, TransposeTransform)]
    assert transforms[len(transforms) - len(transposed) :] == transposed, "indexing of a transposed view"
    window = utils.to_range(jax.tree.map(int, tuple(t for t in transforms if isinstance(t, NDIndexer))))
    key = gpu_callbacks.HostAllocationKey.from_array(allocation)
    value, _, _ = memory.get_buffer_content(key, window, thread, logging_info=logging)
    for transpose in transposed:
        value = np.transpose(value, transpose.permutation)
    return value


def _wgmma(
    *, token, device_id, grid_point_coords, thread_id, acc_allocation_key_as_array, acc_transforms, acc_dtype,
    a_allocation_key_as_array, a_transforms, b_allocation_key_as_array, b_transforms, source_info=None,
):  # fmt: skip
    assert not acc_transforms
    memory, thread, logging = _memory(device_id, thread_id, grid_point_coords, source_info)
    a = _operand(memory, thread, logging, a_allocation_key_as_array, a_transforms)
    b = _operand(memory, thread, logging, b_allocation_key_as_array, b_transforms)
    key = gpu_callbacks.HostAllocationKey.from_array(acc_allocation_key_as_array)
    accumulator, _, _ = memory.get_buffer_content(key, (), thread, logging_info=logging)
    result = accumulator + np.matmul(a.astype(acc_dtype), b.astype(acc_dtype))
    memory.store_buffer_content(key, (), result, thread, logging_info=logging)
    return token


def _interpret(self, jaxpr, token, *args, original=jaxpr_interpret.JaxprInterpreter.interpret):
    equations = [
        eqn.replace(primitive=get_p, params={"tree": eqn.params["tree"]}) if eqn.primitive is load_p else eqn
        for eqn in jaxpr.eqns
    ]
    return original(self, jaxpr.replace(eqns=equations), token, *args)


ADDITIONS = (
    (gpu_callbacks.DeviceLocalMemoryTransfer, "execute", _execute),
    (gpu_callbacks, "_handle_out_of_bounds_read", _read_beyond_the_edge),
    (gpu_callbacks, "copy_smem_to_gmem", _copy_smem_to_gmem),
    (gpu_callbacks, "wgmma", _wgmma),
    (jaxpr_interpret.JaxprInterpreter, "interpret", _interpret),
)
"""What is replaced: owner, name, and by what."""
