"""Compiling the low-rank matmul for a Hopper GPU that is not here, and what the result must look like."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
from typing import Literal

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from jaxtune_kernels.low_rank.gpu import low_rank_product

from jaxtune.parallel.targets import compile_for_target, target_devices

_reported: set[tuple[object, ...]] = set()


def compile_product(
    target: str,
    shape: tuple[int, int, int, int],
    rank: int,
    direction: Literal["forward", "backward"],
    capfd: pytest.CaptureFixture[str],
    dropout: bool = True,
) -> str:
    """The compiled text of one pass of a layer, checked: two launches, no copy of a large operand, no spilled register.

    Args:
      target: as in :func:`jaxtune.parallel.targets.target_devices`.
      shape: groups, rows of a group, columns into and out of the layer; the backward pass goes the other way.
      capfd: in which ptxas' report is found.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None:
        pytest.skip("compiling for a GPU needs the extra targets and ptxas")
    groups, m, inputs, outputs = shape
    k, n = (inputs, outputs) if direction == "forward" else (outputs, inputs)
    sharding = SingleDeviceSharding(target_devices(target)[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    keys = (array((groups,), jnp.float32), array((groups,), jnp.uint32), array((groups, m), jnp.uint32))
    arguments = (
        array((groups, m, k), jnp.bfloat16),
        array((inputs, outputs), jnp.bfloat16),
        array((groups, k, rank), jnp.float32),
        array((groups, rank, n), jnp.float32),
        array((groups,), jnp.float32),
        array((n,), jnp.float32) if direction == "forward" else None,
        keys if dropout else None,
    )
    options = {"transposed": direction == "backward", "drop": "input" if direction == "forward" else "output"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        text = compile_for_target(functools.partial(low_rank_product, **options), *arguments).as_text()
    report = capfd.readouterr()
    # Of a kernel that this process has compiled before (for the other Hopper GPU; forward, without the dropout that
    # the other launch has; at a rank that is padded to the same), ptxas is not asked again.
    matmul = (shape, -(-rank // 16) * 16, direction, dropout and direction == "backward")
    assert matmul in _reported or "'low_rank_frozen_matmul" in report.out + report.err
    _reported.add(matmul)
    assert "spill" not in (report.out + report.err).replace("0 bytes spill stores, 0 bytes spill loads", "")
    assert "serialized" not in report.out + report.err

    calls = re.findall(r"= (\S+?)\{\S* custom-call\((.*?)\), custom_call_target=\"(\w+)\"", text)
    assert [target for _, _, target in calls] == ["mosaic_gpu_v2"] * 2
    assert {result for result, _, _ in calls} == {
        f"bf16[{groups},{m},{-(-rank // 16) * 16}]",
        f"bf16[{groups},{m},{n}]",
    }
    # x goes into both kernels, and W into the second, as the very parameters of the program.
    assert all(operands.startswith("%x") for _, operands, _ in calls)
    assert sum("%w" in operands for _, operands, _ in calls) == 1
    large = min(groups * m * min(k, n), inputs * outputs)
    made = re.findall(r"= bf16\[([\d,]+)\]\S* (?!parameter|custom-call|get-tuple-element|bitcast)[\w-]+\(", text)
    sizes = [functools.reduce(lambda product, size: product * int(size), shape.split(","), 1) for shape in made]
    assert max(sizes, default=0) < large, "a copy of x, W or y"
    return text
