"""The low-rank matmul with the grouped Pallas kernel of a platform: its derivative, its rule for vmap, its cuts.

One kernel, ``low_rank_product`` (:mod:`~jaxtune_kernels.low_rank.tpu` says what it computes), serves both passes:

    forward    y = x W + scale · h B + bias,           h = (mask(x) / (1 - rate)) A
    backward   dx = g Wᵀ + mask((scale / (1 - rate)) · t Aᵀ),   t = g Bᵀ

The forward pass keeps x, which is alive anyway, and h; the gradients of A and B are thin products with h and t that are
left to XLA: they read x and g once more each, M (K + N) entries, and write r (K + N).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxtune_kernels.low_rank.xla import LOW_RANK_STATES, Dropout, Residuals, parameter_gradients
from jaxtune_kernels.quantized import Matrix, Quantized
from jaxtune_kernels.transforms import Cuts, first_index, grouped, psum, without_derivative

Platform = Literal["tpu", "gpu"]

_NO_SECOND = "the Pallas kernels of low_rank_matmul have no second derivative; use implementation='xla'"


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Which kernel, and the mesh axes over which the dimensions m, k, n and g (trials) are cut.

    Attributes:
      platform: whose kernel.
      axes: pairs of a dimension's name and its mesh axes; hashable, as jax asks of what is not an array.
      interpret: run the TPU's kernel in Pallas' interpreter.
    """

    platform: Platform
    axes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    interpret: bool = False

    def __call__(
        self,
        x: Float[Array, "m inner"],
        w: Float[Array, "..."],
        a: Float[Array, "inner r"],
        b: Float[Array, "r outer"],
        scale: Float[Array, ""],
        bias: Float[Array, " outer"] | None,
        dropout: Dropout | None,
        *,
        backward: bool,
    ) -> tuple[Float[Array, "m outer"], Float[Array, "m r"]]:
        """The product and h of one adapter; under vmap, of all adapters in one launch."""
        # Forward contracts k and yields n; backward the other way round, with W [k, n] in both.
        inner, outer = ("n", "k") if backward else ("k", "n")
        call = grouped(
            functools.partial(_launch, self, backward),
            (f"g m {inner}", "k n", f"g {inner} r", f"g r {outer}", "g", outer, ("g", "g", "g m")),
            (f"g m {outer}", "g m r"),
            dict(self.axes),
        )
        x, a, b, scale, dropout = jax.tree.map(lambda array: array[None], (x, a, b, scale, dropout))
        y, h = call(x, w, a, b, scale, bias, dropout)
        return y[0], h[0]


def _launch(
    launcher: Launcher,
    backward: bool,
    cuts: Cuts,
    x: Array,
    w: Array,
    a: Array,
    b: Array,
    scale: Array,
    bias: Array | None,
    dropout: tuple[Array, Array, Array] | None,
) -> tuple[Array, Array]:
    """One device's launch. Where the contracted dimension is cut, each share's sums are rounded and then added."""
    if not x.shape[0]:
        return jnp.zeros((*x.shape[:2], b.shape[-1]), x.dtype), jnp.zeros((*x.shape[:2], b.shape[1]), x.dtype)
    inner = cuts["n" if backward else "k"]
    options: dict[str, Any] = {}
    # The mask is drawn for k, forward and backward.
    if dropout is not None and cuts["k"]:
        options["first_column"] = first_index(cuts["k"], b.shape[-1] if backward else x.shape[-1])
    product = functools.partial(
        _product(launcher.platform), transposed=backward, drop="output" if backward else "input", **options
    )
    with _interpreter(launcher.interpret):
        y, h = without_derivative(product, _NO_SECOND)(x, w, a, b, scale, None if inner else bias, dropout)
    if not inner:
        return y, h
    y, h = psum(y, inner), psum(h, inner)
    # Once, not once a share.
    return y if bias is None else (y + bias.astype(jnp.float32)).astype(y.dtype), h


def _product(platform: Platform) -> Callable[..., tuple[Array, Array]]:
    # Imported when used: a platform's kernel needs parts of jax that another's installation may lack.
    return importlib.import_module(f"jaxtune_kernels.low_rank.{platform}").low_rank_product


def _interpreter(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    if not wanted:
        return contextlib.nullcontext()
    from jax.experimental.pallas import tpu as pltpu

    # True is the plain interpreter, which also works under scan and remat; the other one is for finding races.
    return pltpu.force_tpu_interpret_mode(True)  # pyright: ignore[reportArgumentType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank_matmul_pallas(
    launcher: Launcher,
    x: Float[Array, "*rows k"],
    kernel: Matrix,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""],
    bias: Float[Array, " n"] | None,
    dropout: Dropout | None,
) -> Float[Array, "*rows n"]:
    """``y = x W + scale · (dropout(x) A) B + bias``; see :func:`jaxtune_kernels.low_rank_matmul`."""
    return _forward(launcher, x, kernel, a, b, scale, bias, dropout)[0]


def _flat(dropout: Dropout | None) -> tuple[Array, Array, Array] | None:
    return None if dropout is None else (dropout[0], dropout[1], dropout[2].reshape(-1))


def _written_out(kernel: Matrix, dtype: Any) -> Float[Array, "k n"]:
    """W as the kernels read it: one of few bits is first written out, a matrix at a time."""
    return kernel.dequantized(dtype) if isinstance(kernel, Quantized) else kernel


def _forward(
    launcher: Launcher,
    x: Float[Array, "*rows k"],
    kernel: Matrix,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""],
    bias: Float[Array, " n"] | None,
    dropout: Dropout | None,
) -> tuple[Float[Array, "*rows n"], Residuals]:
    rows = x.shape[:-1]
    flat = x.reshape(math.prod(rows), x.shape[-1])
    y, h = launcher(flat, _written_out(kernel, x.dtype), a, b, scale, bias, _flat(dropout), backward=False)
    # y and h are of one launch: unless both are kept, rematerialisation launches it again.
    h = checkpoint_name(h.reshape(*rows, h.shape[-1]), LOW_RANK_STATES)
    return y.reshape(*rows, y.shape[-1]), Residuals(x, kernel, a, b, scale, bias, dropout, h)


def _backward(launcher: Launcher, residuals: Residuals, g: Float[Array, "*rows n"]) -> tuple[Array | None, ...]:
    # Inside a scan, jax hands constants back as NumPy arrays.
    residuals = jax.tree.map(jnp.asarray, residuals)
    x, kernel, a, b, scale, _, dropout, _ = residuals
    rows = x.shape[:-1]
    flat = g.reshape(math.prod(rows), g.shape[-1])
    dx, t = launcher(flat, _written_out(kernel, x.dtype), b.T, a.T, scale, None, _flat(dropout), backward=True)
    gradients = parameter_gradients(residuals, g, t.reshape(*rows, t.shape[-1]))
    return dx.reshape(x.shape), *gradients, None


low_rank_matmul_pallas.defvjp(_forward, _backward)
