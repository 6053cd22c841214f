"""The one table of a decoder's arrays: shape, logical axes and initializer of each.

The abstract tree, the shardings, random initialization and the checks of a checkpoint all follow from :func:`declare`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtune_kernels.quantized import absmax_dtype, block_count, code_dtype, quantize
from jaxtyping import Array, Key

from jaxtune.models.config import DecoderConfig, Quantization
from jaxtune.parallel.sharding import named_sharding

_KERNEL, CODES, ABSMAX = ".kernel", ".codes", ".absmax"
"""Ends of paths: of a linear layer's kernel; of what is held of it where it is quantized."""

_QUERY = "layers.attention.q"

Params = dict[str, Array]
"""Parameters by dotted path; those of the layers are stacked on a leading layer axis."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array before it exists.

    Attributes:
        shape: Its shape; kernels are (in, out), arrays of the layers have the layer axis first.
        axes: Each axis' logical name, which `jaxtune.parallel.sharding` maps to the mesh; None is never cut.
        initializer: ``normal`` (standard deviation ``DecoderConfig.initializer_range``), ``ones`` or ``zeros``.
        quantization: How it is held, as codes and absmax (:func:`held`); None for itself.
        dtype: Name of the dtype that it is held in; None for that of the model.
        units: Its shape for cutting, where what may be cut are not single entries; None for its shape.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initializer: Literal["normal", "ones", "zeros"]
    quantization: Quantization | None = None
    dtype: str | None = None
    units: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def sharding(self, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
        """Where it lies on ``mesh``."""
        return named_sharding(self.axes, self.units or self.shape, mesh)


def declare(config: DecoderConfig) -> dict[str, ArraySpec]:
    """Every array of a decoder, by dotted path, in the order of the computation.

    A kernel stands here as the matrix that it is, however it is held; see :func:`held`.
    """
    embed = ("embed", config.hidden_size)
    mlp = ("mlp", config.intermediate_size)
    vocab = ("vocab", config.vocab_size)
    heads = ("heads", config.num_heads * config.head_dim)
    kv_heads = ("kv_heads", config.num_kv_heads * config.head_dim)
    head_dim = (None, config.head_dim)
    layers = ("layers", config.num_layers)
    specs: dict[str, ArraySpec] = {}

    def add(path: str, *dims: tuple[str | None, int], initializer: Literal["normal", "ones", "zeros"]) -> None:
        if path.startswith("layers."):
            dims = (layers, *dims)
        shape, axes = tuple(size for _, size in dims), tuple(axis for axis, _ in dims)
        quantized = path.startswith("layers.") and path.endswith(_KERNEL)
        specs[path] = ArraySpec(shape, axes, initializer, config.quantization if quantized else None)

    def add_norm(path: str, dim: tuple[str | None, int]) -> None:
        add(f"{path}.scale", dim, initializer="zeros" if config.norm_plus_one else "ones")

    def add_linear(path: str, inputs: tuple[str, int], outputs: tuple[str, int], bias: bool) -> None:
        add(f"{path}.kernel", inputs, outputs, initializer="normal")
        if bias:
            add(f"{path}.bias", outputs, initializer="zeros")

    add("embed.table", vocab, embed, initializer="normal")
    add_norm("layers.attention_norm", embed)
    add_linear("layers.attention.q", embed, heads, config.qkv_bias)
    add_linear("layers.attention.k", embed, kv_heads, config.qkv_bias)
    add_linear("layers.attention.v", embed, kv_heads, config.qkv_bias)
    if config.qk_norm:
        add_norm("layers.attention.q_norm", head_dim)
        add_norm("layers.attention.k_norm", head_dim)
    add_linear("layers.attention.o", heads, embed, config.output_bias)
    if config.post_norms:
        add_norm("layers.attention_post_norm", embed)
    add_norm("layers.mlp_norm", embed)
    add_linear("layers.mlp.gate", embed, mlp, config.mlp_bias)
    add_linear("layers.mlp.up", embed, mlp, config.mlp_bias)
    add_linear("layers.mlp.down", mlp, embed, config.mlp_bias)
    if config.post_norms:
        add_norm("layers.mlp_post_norm", embed)
    add_norm("final_norm", embed)
    if not config.tie_embeddings:
        add_linear("lm_head", embed, vocab, bias=False)
    return specs


def held(config: DecoderConfig) -> dict[str, ArraySpec]:
    """Every array that is held of a decoder: those of :func:`declare`, with ``….kernel.codes`` and ``….kernel.absmax``
    in place of each kernel that is quantized.

    Raises:
        ValueError: A kernel's inputs are no whole blocks.
    """
    specs: dict[str, ArraySpec] = {}
    for path, spec in declare(config).items():
        if spec.quantization is None:
            specs[path] = spec
        else:
            codes, absmax = _quantized(spec, spec.quantization)
            specs |= {f"{path}{CODES}": codes, f"{path}{ABSMAX}": absmax}
    return specs


def _quantized(spec: ArraySpec, kind: Quantization) -> tuple[ArraySpec, ArraySpec]:
    """Codes and absmax in place of a kernel. Codes are cut where absmax is, so in whole blocks."""
    *layers, inputs, outputs = spec.shape
    blocks = block_count(kind, inputs)
    whole = blocks == 1  # a block is a column, whose absmax every part of the column needs
    counted = (*layers, blocks, outputs)
    axes = (*spec.axes[:-2], None, spec.axes[-1]) if whole else spec.axes
    codes = dataclasses.replace(
        spec, quantization=None, dtype=code_dtype(kind).name, units=spec.shape if whole else counted
    )
    return codes, ArraySpec(counted, axes, "ones", dtype=absmax_dtype(kind).name)


def linear_modules(config: DecoderConfig) -> tuple[str, ...]:
    """Paths of the modules that can hold a low-rank adapter, such as ``layers.attention.q`` and ``lm_head``."""
    return tuple(path.removesuffix(_KERNEL) for path in declare(config) if path.endswith(_KERNEL))


def adaptable_modules(config: DecoderConfig) -> dict[str, str]:
    """Paths of the modules that can hold an adapter, the embedding table's among them: those of their matrices."""
    return {"embed": "embed.table", **{path: f"{path}{_KERNEL}" for path in linear_modules(config)}}


def input_of(path: str) -> str:
    """The first of the linear modules that have the same input as one of a layer."""
    return {"layers.attention.k": _QUERY, "layers.attention.v": _QUERY, "layers.mlp.up": "layers.mlp.gate"}.get(
        path, path
    )


def count_parameters(config: DecoderConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(spec.size for spec in declare(config).values())


def shardings(config: DecoderConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.NamedSharding]:
    """Where each array lies on ``mesh``."""
    return {path: spec.sharding(mesh) for path, spec in held(config).items()}


def abstract_params(
    config: DecoderConfig, dtype: DTypeLike = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and (with a mesh) shardings of all parameters, without allocating any."""
    places = {} if mesh is None else shardings(config, mesh)
    return {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or dtype), sharding=places.get(path))
        for path, spec in held(config).items()
    }


def random_params(
    config: DecoderConfig,
    key: Key[Array, ""],
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> Params:
    """Random parameters, born sharded where a mesh is given.

    Each array's key is folded from its path, so it does not depend on which other arrays exist.
    """
    return _initializer(config, jnp.dtype(dtype), mesh)(key)


@functools.lru_cache(maxsize=8)
def _initializer(
    config: DecoderConfig, dtype: np.dtype, mesh: jax.sharding.Mesh | None
) -> Callable[[Key[Array, ""]], Params]:
    def initial(path: str, spec: ArraySpec, key: Key[Array, ""]) -> Array:
        if spec.initializer == "normal":
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            return (config.initializer_range * jax.random.normal(own, spec.shape)).astype(dtype)
        return jnp.full(spec.shape, 1.0 if spec.initializer == "ones" else 0.0, dtype)

    def initialize(key: Key[Array, ""]) -> Params:
        params: Params = {}
        for path, spec in declare(config).items():
            params[path] = initial(path, spec, key)
            if spec.quantization is not None:
                kernel = jax.lax.map(functools.partial(quantize, kind=spec.quantization), params.pop(path))
                params |= {f"{path}{CODES}": kernel.codes, f"{path}{ABSMAX}": kernel.absmax}
        return params

    return jax.jit(initialize, out_shardings=None if mesh is None else shardings(config, mesh))


def check_params(config: DecoderConfig, params: Mapping[str, Array | jax.ShapeDtypeStruct]) -> None:
    """Check names and shapes against the table.

    Raises:
        ValueError: Naming every array that is missing, unknown or of another shape.
    """
    specs = held(config)
    problems = [f"{path} is missing" for path in specs if path not in params]
    problems += [f"{path} is not an array of this decoder" for path in params if path not in specs]
    problems += [
        f"{path} has shape {tuple(params[path].shape)}, not {spec.shape}"
        for path, spec in specs.items()
        if path in params and tuple(params[path].shape) != spec.shape
    ]
    if problems:
        raise ValueError("parameters do not fit the decoder: " + "; ".join(problems))
