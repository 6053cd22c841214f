"""``y = x W + scale · (dropout(x) A) B + bias``: the matmul of a frozen layer with a low-rank adapter."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxtune_kernels.low_rank.pallas import Launcher, Platform, low_rank_matmul_pallas
from jaxtune_kernels.low_rank.reference import low_rank_matmul_reference
from jaxtune_kernels.low_rank.tpu_tiles import Problem, choose_tiles, hbm_bytes
from jaxtune_kernels.low_rank.xla import LOW_RANK_STATES, low_rank_matmul_xla
from jaxtune_kernels.quantized import Matrix, Quantized
from jaxtune_kernels.transforms import GROUP, devices_in_context, joined, portable, spec_of, target_platform

__all__ = ["LOW_RANK_STATES", "low_rank_matmul", "tpu_kernel_moves_less"]

Implementation = Literal["reference", "xla", "pallas", "tpu", "gpu", "interpret"]

_NAMES = {"rows": "m", "inputs": "k", "outputs": "n", "trials": GROUP}


def low_rank_matmul(
    x: Float[Array, "*rows k"],
    kernel: Matrix,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""] | float,
    *,
    bias: Float[Array, " n"] | None = None,
    dropout_rate: Float[Array, ""] | float | None = None,
    dropout_seed: UInt32[Array, ""] | int | None = None,
    rows: UInt32[Array, "*rows"] | None = None,
    implementation: str | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
) -> Float[Array, "*rows n"]:
    """The output of a linear layer with a low-rank adapter, ``x W + scale · (dropout(x) A) B + bias``.

    The sums are float32, the operands of the matmuls have x's dtype, and so has the result. Gradients with respect to
    x, a, b, scale, bias and kernel are exact; the kernel's costs nothing under ``jax.jit`` unless it is asked for.

    Under ``jax.vmap`` the Pallas kernels take all adapters in one launch over one W. A W, or a bias, that is mapped as
    well has no such form, and the launches follow one another.

    Args:
      x: the layer's input, in the compute dtype.
      kernel: the frozen weight W, (in, out), or one of few bits, which has no gradient: XLA makes the matrix inside of
        its product, the Pallas kernels have it written out first.
      a: A, usually float32; a column of zeros takes that rank out of the result and out of b's gradient.
      b: B, usually float32.
      scale: the factor on the low-rank term: alpha / rank, or alpha / sqrt(rank).
      bias: added to the result.
      dropout_rate: the probability in [0, 1) with which an entry of x is dropped on its way into A; at 0, which may be
        traced, nothing is dropped. None does not draw a mask at all.
      dropout_seed: names the draw; needed with dropout_rate.
      rows: an identity for each row of x, which dropout is drawn from, so that it does not depend on how rows are
        batched or packed. By default a row's index in x.
      implementation: None picks the best for the platform and the shape; "reference" is the plain definition in
        float32, "xla" the portable one, "tpu" and "gpu" the Pallas kernels, "pallas" that of the mesh's platform,
        "interpret" that of TPUs in Pallas' interpreter: for tests, on any platform and very slow.
      axes: for the Pallas kernels under a mesh in context (``jax.set_mesh``): the mesh axes that ``rows``, ``inputs``,
        ``outputs`` and ``trials`` are cut over; ``{}`` if x, W and y are whole on every device. Arrays that are cut
        otherwise are moved first. A mesh axis whose size does not divide its dimension is left out. The other
        implementations are cut by the compiler.

    Raises:
      ValueError: the implementation or a name in axes is unknown, dropout_rate comes without dropout_seed, there is no
        Pallas kernel for the platform, or one is asked for under a mesh without axes.
      NotImplementedError: a Pallas kernel is differentiated twice.
    """
    choices = get_args(Implementation)
    if implementation is not None and implementation not in choices:
        raise ValueError(f"unknown implementation {implementation!r}; choose from {', '.join(choices)}")
    if axes is not None and (unknown := [name for name in axes if name not in _NAMES]):
        raise ValueError(f"axes: unknown dimension {unknown[0]!r}; choose from {', '.join(_NAMES)}")
    if dropout_rate is None:
        dropout = None
    elif dropout_seed is None:
        raise ValueError("dropout_rate needs a dropout_seed")
    else:
        if rows is None:
            rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(x.shape[:-1])
        dropout = (jnp.asarray(dropout_rate, jnp.float32), jnp.asarray(dropout_seed, jnp.uint32), rows)
    operands = (x, kernel, a, b, jnp.asarray(scale, jnp.float32), bias, dropout)
    m, k, n, r = math.prod(x.shape[:-1]), *kernel.shape, b.shape[0]
    held = kernel.codes if isinstance(kernel, Quantized) else kernel
    if implementation is None and held is not kernel:
        implementation = "xla"
    elif implementation is None:
        problem = Problem(1, m, k, n, r, x.dtype.itemsize, held.dtype.itemsize, dropout is not None)
        favoured = target_platform() == "tpu" and _can_be_cut(axes) and m * r and tpu_kernel_moves_less(problem)
        implementation = "tpu" if favoured else "xla"
    if implementation == "reference":
        function = low_rank_matmul_reference
    elif implementation == "xla":
        function = low_rank_matmul_xla
    else:
        launcher = _launcher(implementation, axes)
        # A grid without steps writes nothing, and there is nothing in it to be fast at.
        function = functools.partial(low_rank_matmul_pallas, launcher) if m * k * n * r else low_rank_matmul_xla
    return portable(function, lambda x, *_: joined(*spec_of(x)[:-1], spec_of(held)[-1]))(*operands)


def _launcher(implementation: str, axes: Mapping[str, Sequence[str]] | None) -> Launcher:
    if axes is None and devices_in_context() > 1:
        raise ValueError(f"implementation {implementation!r} under a mesh needs axes: what is cut over which mesh axes")
    platform = target_platform() if implementation == "pallas" else implementation
    interpret = platform == "interpret"
    platform = "tpu" if interpret else platform
    if platform not in get_args(Platform):
        raise ValueError(f"there is no Pallas kernel for {platform}; implementation 'xla' runs there")
    cuts = tuple((_NAMES[name], tuple(mesh_axes)) for name, mesh_axes in sorted((axes or {}).items()))
    return Launcher(cast(Platform, platform), cuts, interpret)


def tpu_kernel_moves_less(problem: Problem) -> bool:
    """Whether the TPU kernel plainly moves fewer bytes, forward and backward, than XLA's passes could at the least.

    This is a count, not a measurement, so the kernel must win by a tenth: its side counts every re-read of its blocks,
    XLA's side reads each operand once per pass. What XLA compiles for a TPU is three passes (h from x; the frozen
    product, to a float32 array; that, plus h B, to y), so x is read twice and M × N float32 numbers are written and
    read again. Under a mesh the whole arrays are compared.
    """
    ours = least = 0
    for each in (problem, problem._replace(k=problem.n, n=problem.k)):
        _, m, k, n, r = each[:5]
        ours += hbm_bytes(each, choose_tiles(each))
        least += (2 * m * k + m * n + r * (m + k + n)) * each.x_bytes + k * n * each.w_bytes + 2 * 4 * m * n
    return ours < 0.9 * least


def _can_be_cut(axes: Mapping[str, Sequence[str]] | None) -> bool:
    """Whether a Pallas call here would be partitioned as the caller says, or has nothing to partition."""
    if devices_in_context() > 1:
        return axes is not None
    # Arrays may be cut over devices although no mesh is in context, and a traced one does not tell.
    return jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
