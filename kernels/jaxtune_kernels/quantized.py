"""Frozen matrices of four or eight bits an entry: what is held of them, how they are made, and the product with them.

A matrix W (in, out) is held as *codes*, one for each entry, and *absmax*, the largest magnitude of each block of
entries. A block is a run of inputs of one output:

    nf4     uint4, the nearest of 16 quantiles of a normal distribution, blocks of 64 (QLoRA, arXiv:2305.14314, and
            the values, blocks and order of codes of bitsandbytes); absmax bfloat16, 4.25 bits an entry in all
    int8    int8, absmax / 127 times the nearest integer; a block is an output's whole column
    fp8     float8_e4m3fn, absmax / 448 times the nearest such number; a block is an output's whole column

What is differentiated keeps codes and absmax and makes the matrix of them a second time: a matrix that was written out
would stay in memory from the forward pass to the backward pass, that of every layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxtune_kernels.transforms import joined, portable, spec_of

Kind = Literal["nf4", "int8", "fp8"]

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The 16 values of NF4 (arXiv:2305.14314, appendix E)."""

NF4_BLOCKS = (64, 32)
"""Sizes of NF4's blocks, the first that divides the inputs; smaller ones would cost more than 4.5 bits an entry."""

_CODES = {"nf4": jnp.uint4, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_KINDS: dict[np.dtype, Kind] = {np.dtype(dtype): kind for kind, dtype in _CODES.items()}  # pyright: ignore[reportAssignmentType]


@dataclasses.dataclass(frozen=True, init=False)
class Quantized:
    """A frozen matrix of few bits, or a stack of such: a pytree, whose dtypes say of which kind it is.

    Its derivative is zero: it is not there to be trained.

    Attributes:
      codes: of each entry, uint4, int8 or float8_e4m3fn.
      absmax: the largest magnitude of each block of inputs, for each output.
      places: what the codes and absmax are brought to before the matrix is made of them, shardings or None: so that it
        is they, and not the matrix, that move between devices.
    """

    codes: Num[Array, "*layers k n"]
    absmax: Float[Array, "*layers blocks n"]
    places: tuple[Any, Any] | None

    # Leaves are not annotated: jax also builds this tree with shapes, shardings, axes or placeholders for leaves.
    def __init__(self, codes: Any, absmax: Any, places: tuple[Any, Any] | None = None) -> None:
        for name, value in (("codes", codes), ("absmax", absmax), ("places", places)):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.codes.shape

    @property
    def kind(self) -> Kind:
        """``nf4``, ``int8`` or ``fp8``."""
        return _KINDS[np.dtype(self.codes.dtype)]

    def dequantized(self, dtype: Any) -> Float[Array, "*layers k n"]:
        """The matrix, made with arithmetic of ``dtype``: XLA makes it inside of a product on TPUs, and writes none."""
        codes, absmax = self.codes, self.absmax
        if self.places is not None:
            codes, absmax = (
                jax.lax.with_sharding_constraint(array, place)
                for array, place in zip((codes, absmax), self.places, strict=True)
            )
        if self.kind == "nf4":
            values = jnp.asarray(NF4, dtype)[codes.astype(jnp.int32)]
            *layers, k, n = codes.shape
            blocks = values.reshape(*layers, absmax.shape[-2], -1, n)
            return (blocks * absmax.astype(dtype)[..., None, :]).reshape(*layers, k, n)
        return codes.astype(dtype) * (absmax / _LARGEST[self.kind]).astype(dtype)


jax.tree_util.register_dataclass(Quantized, data_fields=["codes", "absmax"], meta_fields=["places"])

Matrix = Float[Array, "k n"] | Quantized
"""A matrix as it is held."""


def matrix(kernel: Any, dtype: Any) -> Float[Array, "..."]:
    """A matrix in the dtype of a product, whichever way it is held."""
    return kernel.dequantized(dtype) if isinstance(kernel, Quantized) else kernel.astype(dtype)


def code_dtype(kind: Kind) -> np.dtype:
    """The dtype of a kind's codes."""
    return np.dtype(_CODES[kind])


def absmax_dtype(kind: Kind) -> np.dtype:
    """The dtype in which a kind's absmax is held."""
    return np.dtype(jnp.bfloat16 if kind == "nf4" else jnp.float32)


def block_count(kind: Kind, inputs: int) -> int:
    """Number of blocks of a column of a matrix.

    Raises:
      ValueError: neither of NF4's sizes of blocks divides the inputs.
    """
    if kind != "nf4":
        return 1
    size = next((size for size in NF4_BLOCKS if inputs % size == 0), None)
    if size is None:
        raise ValueError(f"{inputs} inputs are no whole blocks of {' or '.join(map(str, NF4_BLOCKS))}")
    return inputs // size


def largest(kind: Kind, kernel: Float[Array, "k n"]) -> Float[Array, "blocks n"]:
    """The absmax of each block of a matrix, float32."""
    k, n = kernel.shape
    return jnp.max(jnp.abs(kernel.astype(jnp.float32).reshape(block_count(kind, k), -1, n)), axis=1)


def codes_of(kind: Kind, kernel: Float[Array, "k n"], absmax: Float[Array, "blocks n"]) -> Num[Array, "k n"]:
    """The codes of a matrix, the nearest that there are; of two as near, NF4 takes the lower one, as bitsandbytes does.

    Args:
      kind: of the codes.
      kernel: the matrix.
      absmax: of :func:`largest`; codes follow from it before it is rounded to :func:`absmax_dtype`.
    """
    blocks = kernel.astype(jnp.float32).reshape(absmax.shape[0], -1, absmax.shape[1])
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)[:, None]
    if kind == "nf4":
        between = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(np.float32)
        scaled = blocks * inverse
        codes = sum((scaled > each).astype(jnp.int32) for each in between)
    else:
        codes = blocks * (inverse * _LARGEST[kind])
        codes = jnp.round(codes) if kind == "int8" else codes
    return jnp.asarray(codes).astype(_CODES[kind]).reshape(kernel.shape)


def quantize(kernel: Float[Array, "k n"], kind: Kind) -> Quantized:
    """A matrix in few bits.

    Raises:
      ValueError: see :func:`block_count`.
    """
    absmax = largest(kind, kernel)
    return Quantized(codes_of(kind, kernel, absmax), absmax.astype(absmax_dtype(kind)))


def quantized_matmul(x: Float[Array, "*rows k"], kernel: Quantized) -> Float[Array, "*rows n"]:
    """``x W``, in x's dtype, with a frozen W of few bits; the derivative keeps W's codes and nothing else.

    Args:
      x: input.
      kernel: W; has no gradient.
    """
    return portable(_product, lambda x, _: joined(*spec_of(x)[:-1], spec_of(kernel.codes)[-1]))(x, kernel)


@jax.custom_vjp
def _product(x: Float[Array, "*rows k"], kernel: Quantized) -> Float[Array, "*rows n"]:
    return jnp.dot(x, kernel.dequantized(x.dtype))


def _forward(x: Float[Array, "*rows k"], kernel: Quantized) -> tuple[Float[Array, "*rows n"], Quantized]:
    return _product(x, kernel), kernel


def _backward(kernel: Quantized, g: Float[Array, "*rows n"]) -> tuple[Float[Array, "*rows k"], None]:
    # Inside a scan, jax hands constants back as NumPy arrays.
    kernel = jax.tree.map(jnp.asarray, kernel)
    return jnp.einsum("...n,kn->...k", g, kernel.dequantized(g.dtype)), None


_product.defvjp(_forward, _backward)
