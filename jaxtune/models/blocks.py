"""The parts of one decoder layer. In the decoder their parameters are stacks; inside the scan, one layer's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxtune.models.attention import HEADS, attend
from jaxtune.models.cache import write_slots
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import declare
from jaxtune.models.linear import Adapter, linear
from jaxtune.models.rotary import rotate
from jaxtune.models.splash import splash_applies, splash_attend
from jaxtune.models.weight import held_kernel, read_kernel
from jaxtune.parallel.sharding import projection_axes

Adapters = Mapping[str, Adapter]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Shared(NamedTuple):
    """What all layers of one call have in common, computed once outside the scan.

    Attributes:
        table: Rotary angles, of the layers without a window if ``local_table`` is given.
        local_table: Rotary angles of the layers with a window, where they differ.
        query_segments: Segment of each token of this call.
        key_segments: Segment of each slot that is attended to.
        query_slots: The slot of each token of this call among the cache's; None without a cache.
        rows: Identities of the tokens, for dropout.
        kernels: What computes products with adapters.
        mesh: What the activations lie on, or None.
    """

    table: Float[Array, "2 b s half"]
    local_table: Float[Array, "2 b s half"] | None
    query_segments: Int32[Array, "#b s"]
    key_segments: Int32[Array, "#b t"]
    query_slots: Int32[Array, " s"] | None
    rows: UInt32[Array, "b s"] | None
    kernels: str
    mesh: jax.sharding.Mesh | None


class Layer(NamedTuple):
    """What is a layer's own, beside its weights: whether it has a window."""

    local: Bool[Array, ""]


Cached = tuple[Float[Array, "b kv slots hd"], Float[Array, "b kv slots hd"]]
Written = tuple[Float[Array, "b kv s hd"], Float[Array, "b kv s hd"]]


def subtree(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below ``prefix``, with paths relative to it."""
    start = f"{prefix}."
    return {path.removeprefix(start): value for path, value in params.items() if path.startswith(start)}


# Elementwise functions keep their inputs alone and are computed again in the backward pass, whatever the remat policy:
# that takes no longer than to write and read what they would keep, and 30 % of a step's memory is saved.


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _normed(x: Float[Array, "*rows d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "*rows d"]:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _gated(gate: Float[Array, "b s d"], up: Float[Array, "b s d"], activation: str) -> Float[Array, "b s d"]:
    return _ACTIVATIONS[activation](gate) * up


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv:1910.07467), computed in float32; the result has the input's dtype."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.scale = nnx.Param(params["scale"])
        self.epsilon = config.norm_eps
        self.plus_one = config.norm_plus_one

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Norm the last axis."""
        scale = self.scale[...].astype(jnp.float32)
        return _normed(x, 1.0 + scale if self.plus_one else scale, self.epsilon)


class Linear(nnx.Module):
    """A kernel (in, out), perhaps of few bits, perhaps a bias; an adapter comes with the call."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any], path: str):
        self.kernel = held_kernel(params)
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.axes = declare(config)[f"{path}.kernel"].axes[-2:]

    @property
    def matrix(self) -> Float[Array, "inputs outputs"]:
        """The kernel, where it is held as it is."""
        assert isinstance(self.kernel, nnx.Param)
        return self.kernel[...]

    def __call__(
        self, x: Float[Array, "b s inputs"], adapter: Adapter | None, shared: Shared
    ) -> Float[Array, "b s outputs"]:
        """See :func:`jaxtune.models.linear.linear`."""
        bias = None if self.bias is None else self.bias[...]
        axes = projection_axes(*self.axes)
        kernel = read_kernel(self.kernel, self.axes, shared.mesh)
        return linear(x, kernel, bias, adapter, shared.rows, kernels=shared.kernels, axes=axes)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.config = config
        self.q, self.k, self.v, self.o = (
            Linear(config, subtree(params, name), f"layers.attention.{name}") for name in "qkvo"
        )
        self.q_norm = RMSNorm(config, subtree(params, "q_norm")) if config.qk_norm else None
        self.k_norm = RMSNorm(config, subtree(params, "k_norm")) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "b s d"], layer: Layer, shared: Shared, adapters: Adapters, cached: Cached | None
    ) -> tuple[Float[Array, "b s d"], Written]:
        """Attend, also to what this layer has cached if there is a cache; gives the new keys and values too."""
        config, (batch, length, _) = self.config, x.shape
        groups = config.num_heads // config.num_kv_heads

        def heads(projection: Linear, name: str, count: int) -> Float[Array, "b s count head_dim"]:
            out = projection(x, adapters.get(f"attention.{name}"), shared)
            return out.reshape(batch, length, count, config.head_dim)

        q = heads(self.q, "q", config.num_heads)
        k = heads(self.k, "k", config.num_kv_heads)
        v = heads(self.v, "v", config.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)

        table = shared.table
        if shared.local_table is not None:
            table = jnp.where(layer.local, shared.local_table, table)
        q, k = rotate(q, table, config.query_scale), rotate(k, table)

        q = q.reshape(batch, length, config.num_kv_heads, groups, config.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        written = k, v
        if cached is not None and shared.query_slots is not None:
            first = shared.query_slots[0]
            k, v = (write_slots(old, new, first) for old, new in zip(cached, written, strict=True))

        q, k, v = (checkpoint_name(array, HEADS) for array in (q, k, v))
        mixed = self._mixed(q, k, v, layer, shared)
        merged = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, config.num_heads * config.head_dim)
        return self.o(merged, adapters.get("attention.o"), shared), written

    def _mixed(
        self,
        q: Float[Array, "b kv g s d"],
        k: Float[Array, "b kv t d"],
        v: Float[Array, "b kv t d"],
        layer: Layer,
        shared: Shared,
    ) -> Float[Array, "b kv g s d"]:
        config = self.config
        cached = shared.query_slots is not None
        splash = splash_applies(q.shape[3], config.head_dim, config.attention_soft_cap, cached, shared.mesh)

        def with_window(window: int | None) -> Callable:
            def branch(q: Array, k: Array, v: Array) -> Array:
                if splash:
                    return splash_attend(q, k, v, shared.query_segments, window, shared.mesh)
                segments = shared.query_segments, shared.key_segments
                return attend(q, k, v, *segments, shared.query_slots, window, config.attention_soft_cap)

            return branch

        if len(set(config.windows)) == 1:
            return with_window(config.window)(q, k, v)
        # A branch, not a selected mask: each side has its window as a constant, as fused kernels need it.
        return lax.cond(layer.local, with_window(config.window), with_window(None), q, k, v)


class MLP(nnx.Module):
    """Gated MLP (arXiv:2002.05202): ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.activation = config.activation
        self.gate, self.up, self.down = (
            Linear(config, subtree(params, name), f"layers.mlp.{name}") for name in ("gate", "up", "down")
        )

    def __call__(self, x: Float[Array, "b s d"], shared: Shared, adapters: Adapters) -> Float[Array, "b s d"]:
        """Apply the MLP to each position."""
        gate = self.gate(x, adapters.get("mlp.gate"), shared)
        up = self.up(x, adapters.get("mlp.up"), shared)
        return self.down(_gated(gate, up, self.activation), adapters.get("mlp.down"), shared)


class Block(nnx.Module):
    """One layer: attention and MLP, each normed before (with post norms also after) and added to the residual."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        def norm(name: str) -> RMSNorm:
            return RMSNorm(config, subtree(params, name))

        self.attention_norm = norm("attention_norm")
        self.attention = Attention(config, subtree(params, "attention"))
        self.attention_post_norm = norm("attention_post_norm") if config.post_norms else None
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(config, subtree(params, "mlp"))
        self.mlp_post_norm = norm("mlp_post_norm") if config.post_norms else None

    def __call__(
        self, x: Float[Array, "b s d"], layer: Layer, shared: Shared, adapters: Adapters, cached: Cached | None
    ) -> tuple[Float[Array, "b s d"], Written]:
        """Apply the layer; ``adapters`` are keyed by paths inside the layer, such as ``attention.q``."""
        attended, written = self.attention(self.attention_norm(x), layer, shared, adapters, cached)
        x = x + (attended if self.attention_post_norm is None else self.attention_post_norm(attended))
        transformed = self.mlp(self.mlp_norm(x), shared, adapters)
        return x + (transformed if self.mlp_post_norm is None else self.mlp_post_norm(transformed)), written
