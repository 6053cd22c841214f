"""The only reader of the kernels of linear layers, however they are held."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtune_kernels import Quantized
from jaxtyping import Array, Float

from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import ABSMAX, CODES, Params, declare
from jaxtune.parallel.sharding import constrain, named_sharding, partition_spec


class QuantizedKernel(nnx.Module):
    """A kernel of few bits; see :class:`jaxtune_kernels.Quantized`."""

    def __init__(self, codes: Any, absmax: Any):
        self.codes = nnx.Param(codes)
        self.absmax = nnx.Param(absmax)


def held_kernel(params: Mapping[str, Any]) -> nnx.Param | QuantizedKernel:
    """What a linear layer holds of its kernel, given the arrays below the layer's path."""
    if "kernel" in params:
        return nnx.Param(params["kernel"])
    return QuantizedKernel(params[f"kernel{CODES}"], params[f"kernel{ABSMAX}"])


def read_kernel(
    kernel: nnx.Param | QuantizedKernel, axes: tuple[str | None, ...], mesh: jax.sharding.Mesh | None
) -> Float[Array, "inputs outputs"] | Quantized:
    """The kernel of one layer, for :func:`jaxtune.models.linear.linear`.

    Args:
        kernel: As it is held.
        axes: Logical axes of its inputs and outputs.
        mesh: The mesh that it lies on, or None. What is cut by the width of the states is whole in a product, and codes
            are brought together before the matrix is made of them: XLA by itself would move the matrix.
    """
    if not isinstance(kernel, QuantizedKernel):
        return kernel[...]
    codes, absmax = kernel.codes[...], kernel.absmax[...]
    if mesh is None or mesh.size == 1:
        return Quantized(codes, absmax)
    gathered = tuple(None if axis == "embed" else axis for axis in axes)
    if absmax.shape[0] == 1:
        return Quantized(codes, absmax, (_place(gathered, codes, mesh), _place((None, gathered[1]), absmax, mesh)))
    place = _place(gathered, absmax, mesh)
    return Quantized(codes, absmax, (place, place))


def _place(axes: tuple[str | None, ...], array: Array, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return named_sharding(axes, array.shape, mesh)


def quantized_stack(params: Mapping[str, Any], path: str) -> Quantized | None:
    """What is held of a kernel of all layers, such as ``layers.attention.q.kernel``; None if it is not quantized."""
    if f"{path}{CODES}" not in params:
        return None
    return Quantized(params[f"{path}{CODES}"], params[f"{path}{ABSMAX}"])


def readable(params: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None) -> Mapping[str, Any]:
    """Parameters by the paths of :func:`~jaxtune.models.declarations.declare`, for whoever reads kernels.

    Those that are quantized are written out where they are asked for, in the dtype of the model.

    Args:
        params: As they are held.
        mesh: That they are cut over, for :func:`summed_over_inputs`; None where nothing is cut.
    """
    return _Readable(params, mesh) if any(path.endswith(CODES) for path in params) else params


def summed_over_inputs(
    base: Mapping[str, Any],
    path: str,
    axes: tuple[str | None, str | None],
    function: Callable[..., Float[Array, "..."]],
    *beside: Float[Array, "*layers inputs _"],
) -> Float[Array, "..."]:
    """What a sum over the inputs of a kernel, and of arrays that have the same inputs, gives for each layer.

    Of a quantized kernel one layer is written out at a time. What a device has of a kernel's inputs is summed in that
    loop, and over devices behind it: see :attr:`~jaxtune.updates.treatments.base.Treatment.whole`.

    Args:
        base: Of :func:`readable`.
        path: Of the kernel.
        axes: Logical axes of its inputs and outputs.
        function: Sums over the last axis but one of all that it is given, with any axes before.
        beside: Further arguments behind the kernel.
    """
    stack = quantized_stack(base.params, path) if isinstance(base, _Readable) else None
    if stack is None:
        return function(base[path], *beside)
    assert isinstance(base, _Readable)
    parts, dtype = 1, base.dtype
    if base.mesh is not None and base.mesh.size > 1:
        counted = stack.codes if stack.absmax.shape[-2] == 1 else stack.absmax
        cut = partition_spec((None, *axes), counted.shape, base.mesh)[-2]
        names = (cut,) if isinstance(cut, str) else cut or ()
        parts = math.prod(base.mesh.shape[name] for name in names)
        if parts == 1:
            beside = tuple(constrain(array, (None,) * array.ndim, base.mesh) for array in beside)

    def split(array: Array) -> Array:
        layers, inputs, last = array.shape
        return array[:, None] if inputs == 1 else array.reshape(layers, parts, inputs // parts, last)

    def summed(one: tuple[Quantized, tuple[Array, ...]]) -> Array:
        kernel, others = one
        return function(kernel.dequantized(dtype), *others)

    return jnp.sum(jax.lax.map(summed, jax.tree.map(split, (stack, beside))), axis=1)


class _Readable(Mapping[str, Any]):
    def __init__(self, params: Mapping[str, Any], mesh: jax.sharding.Mesh | None):
        self.params, self.mesh = params, mesh

    @property
    def dtype(self) -> Any:
        """Of the model."""
        return self.params["embed.table"].dtype

    def __getitem__(self, path: str) -> Any:
        stack = quantized_stack(self.params, path)
        return self.params[path] if stack is None else stack.dequantized(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return (path.removesuffix(CODES) for path in self.params if not path.endswith(ABSMAX))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _written_out(stack: Quantized) -> Float[Array, "layers inputs outputs"]:
    """The kernels of all layers, bfloat16: one layer at a time in float32, and each entry rounded once."""

    def layers(stack: Quantized) -> Array:
        return jax.lax.map(lambda layer: layer.dequantized(jnp.float32).astype(jnp.bfloat16), stack)

    return jax.jit(layers, out_shardings=stack.codes.sharding)(stack)


def dequantized(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """The configuration and the parameters, all bfloat16, of a quantized model as one without codes.

    Those of another model are given back.

    Args:
        config: Of the parameters.
        params: The parameters; kernels that are written out already may stand beside their codes.
    """
    if config.quantization is None:
        return config, params
    plain: Params = {}
    for path in declare(config):
        stack = None if path in params else quantized_stack(params, path)
        plain[path] = params[path].astype(jnp.bfloat16) if stack is None else _written_out(stack)
    return dataclasses.replace(config, quantization=None, dequantized_from=config.quantization), plain
