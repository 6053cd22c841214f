"""Compiling the masked update for a target, and reading in the program what it does to the memory."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import Selection, masked_update

from jaxtune.parallel.targets import compile_for_target, target_devices

CUSTOM_CALLS = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}
_devices = functools.cache(target_devices)


def compile_update(
    target: str,
    shape: tuple[int, ...],
    block: tuple[int | None, int | None],
    count: int,
    dtype: str,
    moment_dtype: str,
    cut: int | None = None,
    **options: Any,
) -> tuple[jax.stages.Compiled, int, int]:
    """AdamW of ``count`` blocks, on one device, or with dimension ``cut`` over all of them.

    Returns:
      The program, the bytes of parameters and state on a device, and the bytes that an update must touch on a device.
    """
    devices = _devices(target)
    mesh = Mesh(np.array(devices if cut is not None else devices[:1]), ("fsdp",), axis_types=(AxisType.Auto,))
    spans = cut is not None and cut >= len(shape) - 2 and block[cut - len(shape)] is None
    param = P(*("fsdp" if d == cut else None for d in range(len(shape))))
    moment = P(*((None, *param[-2:]) if spans else ("fsdp",))) if cut is not None else P()
    slots = P() if spans or cut is None else P("fsdp")

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    axes = None if cut is None else {cut: ("fsdp",)}
    optimizer = masked_update(moment_dtype=jnp.dtype(moment_dtype), axes=axes, **options)
    params, selection = struct(shape, dtype, param), Selection(struct((count,), jnp.int32, slots), block)
    state = jax.tree.map(
        lambda leaf: struct(leaf.shape, leaf.dtype, moment if leaf.ndim == 3 else slots),
        jax.eval_shape(optimizer.init, params, selection),
    )
    grads = struct(state.moments[0].shape, dtype, moment)

    # In the order of the results: donated arrays of one size are taken for whichever result comes first.
    def step(params, state, grads, rate, seed):
        return optimizer.apply(grads, state, params, rate, seed=seed, weight_decay=0.1)

    rate, seed = struct((), jnp.float32, P()), struct((), jnp.uint32, P())
    with jax.set_mesh(mesh):
        compiled = compile_for_target(
            step, params, state, grads, rate, seed, donate_argnums=(0, 1),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, (params, state)),
        )  # fmt: skip
    elements = math.prod(state.moments[0].shape) // mesh.size
    p_bytes, m_bytes = jnp.dtype(dtype).itemsize, jnp.dtype(moment_dtype).itemsize
    held = math.prod(shape) // mesh.size * p_bytes + 2 * elements * m_bytes
    return compiled, held, elements * (3 * p_bytes + 4 * m_bytes)


def check_in_place(compiled: jax.stages.Compiled, held: int, target: str) -> None:
    """One launch of the kernel, its results where its operands were, and nothing copied or sent around it."""
    text = compiled.as_text()
    kind = "tpu" if target.startswith("v") else "gpu"
    launches = [line for line in text.splitlines() if f'custom_call_target="{CUSTOM_CALLS[kind]}"' in line]
    assert len(launches) == 1
    _, _, aliases = launches[0].partition("output_to_operand_aliasing={")
    assert re.findall(r"\{(\d)\}: \(\d+, \{\}", aliases) == ["0", "1", "2"]
    assert not re.findall(r"= \S+ (while|all-gather|all-to-all|all-reduce|collective-permute)[-\w]*\(", text)
    memory = compiled.memory_analysis()
    # Scalars of the slots and of the step, in the padded forms that the chip's memories ask for.
    slack = 1 << 20
    assert held <= memory.alias_size_in_bytes <= held + slack
    assert memory.temp_size_in_bytes <= slack


def bytes_copied_by_grid(jaxpr: Any) -> int:
    """Bytes that the pipeline of the one kernel in a program copies: steps of the grid times blocks of the operands."""
    (launch,) = kernels(jaxpr)
    mapping = launch.params["grid_mapping"]
    steps = math.prod(mapping.grid)
    blocks = [
        math.prod(int(getattr(side, "block_size", side)) for side in block.block_shape)
        * block.array_aval.dtype.itemsize
        for block in mapping.block_mappings
    ]
    return steps * sum(blocks)


def kernels(jaxpr: Any) -> list[Any]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation)
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += kernels(inner)
    return found
