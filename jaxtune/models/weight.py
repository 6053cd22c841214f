"""The only reader of the kernels of linear layers, however they are held."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtune_kernels import Quantized
from jaxtyping import Array, Float

from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import ABSMAX, CODES, Params, declare
from jaxtune.parallel.sharding import named_sharding


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


def readable(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters by the paths of :func:`~jaxtune.models.declarations.declare`, for whoever reads kernels.

    Those that are quantized are written out where they are asked for, in the dtype of the model.
    """
    return _Readable(params) if any(path.endswith(CODES) for path in params) else params


class _Readable(Mapping[str, Any]):
    def __init__(self, params: Mapping[str, Any]):
        self._params = params

    def __getitem__(self, path: str) -> Any:
        stack = quantized_stack(self._params, path)
        return self._params[path] if stack is None else stack.dequantized(self._params["embed.table"].dtype)

    def __iter__(self) -> Iterator[str]:
        return (path.removesuffix(CODES) for path in self._params if not path.endswith(ABSMAX))

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
