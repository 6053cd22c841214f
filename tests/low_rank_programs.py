"""Forward and backward of one layer with low-rank adapters, compiled for devices that are not here, and its text."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtune_kernels import low_rank_matmul

from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.targets import compile_for_target, target_devices

EIGHT = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
GPUS = {"h200": "h200:8"}
# A pass is one launch on a TPU, and two on a GPU, the first of which makes h.
LAUNCHES = {"tpu": 2, "gpu": 4}
ROWS, RANK, TRIALS = 8192, 16, 8
PREFETCHES = ("copy-done", "custom-call")


class Mode(NamedTuple):
    """How a program is spread: over which mesh axes, and over how many trials."""

    mesh: tuple[int, int, int] = (1, 1, 1)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    trials: int = 1


MODES = {
    "alone": Mode(),
    "population": Mode(trials=TRIALS),
    "columns cut": Mode((2, 2, 2), outputs=("tensor",)),
    "rows cut": Mode((2, 2, 2), inputs=("tensor",)),
    "population cut": Mode((2, 2, 2), outputs=("tensor",), trials=TRIALS),
}


class Program(NamedTuple):
    """The compiled text, the shape of the W that a device works with, and whose kernel it is."""

    text: str
    weight: tuple[int, int]
    platform: str

    @property
    def launches(self) -> int:
        """Kernels in the text."""
        return len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu_v2)"', self.text))


def compile_layer(
    kind: str, dtype: str, k: int, n: int, mode: Mode, dropout: bool = True, trained: bool = False
) -> Program:
    """y, and the gradients of x, A, B and the scale, with W cut as the training plan does: over fsdp as well.

    With ``trained`` W's gradient is computed too.
    """
    data, fsdp, tensor = mode.mesh
    size = data * fsdp * tensor
    mesh = make_mesh(data, fsdp, tensor, devices=target_devices({**EIGHT, **GPUS}[kind])[:size])
    platform = "gpu" if kind in GPUS else "tpu"
    axes = {"rows": ("data", "fsdp"), "inputs": mode.inputs, "outputs": mode.outputs}
    rows = ROWS // mode.trials
    fsdp_side = "fsdp" if size > 1 else None
    k_cut, n_cut = (_entry(mode.inputs) or fsdp_side), (_entry(mode.outputs) or fsdp_side)

    def struct(shape, spec, dtype, mapped=True):
        lead = mapped and mode.trials > 1
        return jax.ShapeDtypeStruct(
            (mode.trials, *shape) if lead else shape,
            dtype,
            sharding=NamedSharding(mesh, P(None, *spec) if lead else P(*spec)),
        )

    batch = ("data", "fsdp")
    x = struct((8, rows // 8, k), (batch, None, _entry(mode.inputs)), dtype)
    g = struct((8, rows // 8, n), (batch, None, _entry(mode.outputs)), dtype)
    w = struct((k, n), (k_cut, n_cut), dtype, mapped=False)
    a, b = struct((k, RANK), (k_cut,), jnp.float32), struct((RANK, n), (None, n_cut), jnp.float32)
    scalar = struct((), (), jnp.float32)
    seed = struct((), (), jnp.uint32)

    def layer(x, w, a, b, scale, rate, seed, g):
        def call(x, a, b, scale, w):
            noise = {"dropout_rate": rate, "dropout_seed": seed} if dropout else {}
            return low_rank_matmul(x, w, a, b, scale, implementation=platform, axes=axes, **noise)

        y, pullback = jax.vjp(call, x, a, b, scale, w)
        return y, pullback(g)[: 5 if trained else 4]

    if mode.trials > 1:
        layer = jax.vmap(layer, in_axes=(0, None, 0, 0, 0, 0, 0, 0))
    with jax.set_mesh(mesh):
        compiled = compile_for_target(layer, x, w, a, b, scalar, scalar, seed, g)
    shares = [
        dict(zip(("data", "fsdp", "tensor"), mode.mesh, strict=True))[cut[0]] if cut else 1
        for cut in (mode.inputs, mode.outputs)
    ]
    return Program(compiled.as_text(), (k // shares[0], n // shares[1]), platform)


def check(program: Program, gather_opcodes: frozenset[str] = frozenset()) -> None:
    """As many launches for however many trials; W neither computed, copied nor wrongly gathered.

    ``gather_opcodes`` are further instructions that may give W: those that a gather is made of.
    """
    assert program.launches == LAUNCHES[program.platform]
    assert " while(" not in program.text
    k, n = program.weight
    shapes = {f"[{k},{n}]", f"[{n},{k}]"}
    # A weight gradient, a transposed or a second W, whatever the type of its entries. What comes of a gather over fsdp
    # is W itself, and so is one that is brought on chip, S(1), ahead of its use (whole, or by slices).
    results = re.findall(r"= \w+(\[[\d,]+\])(\S*) ([\w-]+)\(", program.text)
    weights = {
        opcode for shape, place, opcode in results if shape in shapes and not (opcode in PREFETCHES and "S(1)" in place)
    }
    allowed = {"parameter", "bitcast", "get-tuple-element", "all-gather", "all-gather-done", *gather_opcodes}
    assert weights <= allowed, weights
    # Nor inside of a fusion: the gradient of W would be a product.
    products = re.findall(r"= \w+(\[[\d,]+\])\S* dot\(", program.text)
    assert not shapes & set(products), products
    for gathered in re.findall(r"= (.*?) all-gather(?:-start)?\(", program.text):
        # The plan gathers W, A and B over fsdp, and nothing that has rows.
        for shape in re.findall(r"\[([\d,]+)\]", gathered):
            sizes = {int(size) for size in shape.split(",")}
            assert sizes <= _weight_sizes(k, n), f"gathered {gathered}"


def _weight_sizes(k: int, n: int) -> set[int]:
    """Sizes of dimensions of W, A and B, before and after a gather over two devices, with a trial axis."""
    # A gather of B along its columns is one of rows, both shares beneath each other.
    return {k, n, k // 2, n // 2, RANK, 2 * RANK, TRIALS, 1}


def _entry(axes: tuple[str, ...]) -> str | None:
    return axes[0] if axes else None
