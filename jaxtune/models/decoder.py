"""The decoder: embeddings, scanned layers, head; and the bridge between it and plain pytrees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax import lax
from jaxtune_kernels import LOW_RANK_STATES
from jaxtune_kernels.dropout import column_keys, mix32, row_keys
from jaxtyping import Array, Float, Int32, UInt32

from jaxtune.errors import nearest
from jaxtune.models.attention import HEADS, RESIDUALS
from jaxtune.models.blocks import Block, Layer, Linear, RMSNorm, Shared, subtree
from jaxtune.models.cache import Cache
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import Params, adaptable_modules, check_params, declare, held
from jaxtune.models.head import Head
from jaxtune.models.linear import KERNELS, PROJECTION, Adapter
from jaxtune.models.rotary import rotary_table
from jaxtune.parallel.platform import platform
from jaxtune.parallel.sharding import constrain

REMAT = ("none", "dots", "full")
"""What the backward pass recomputes, beside elementwise functions and attention weights, which it always does: nothing;
all but projections and attention; all but the layers' inputs."""

_PRODUCTS = (PROJECTION, LOW_RANK_STATES, RESIDUALS)

Adapters = Mapping[str, Adapter]
Integers = Array | np.ndarray
ACTIVATION_AXES = ("batch", "sequence", None)


class EmbeddingNoise(NamedTuple):
    """Noise on what the layers are given, uniform in ±size, drawn by seed, position's identity and column.

    Attributes:
        seed: Names the draw.
        size: Of each position.
    """

    seed: UInt32[Array, ""]
    size: Float[Array, "b s"]

    def on(self, x: Float[Array, "b s d"], rows: UInt32[Array, "b s"]) -> Float[Array, "b s d"]:
        """X with the noise, given the positions' identities."""
        bits = mix32(row_keys(self.seed, rows)[..., None] ^ column_keys(self.seed, x.shape[-1]))
        uniform = bits.astype(jnp.float32) * 2.0**-31 - 1.0
        return x + (self.size[..., None] * uniform).astype(x.dtype)


class Embedding(nnx.Module):
    """The embedding table."""

    def __init__(self, params: Mapping[str, Any]):
        self.table = nnx.Param(params["table"])


class Decoder(nnx.Module):
    """A decoder-only transformer; `DecoderConfig` says which.

    Attributes:
        config: What it computes.
        mesh: The mesh that its parameters lie on, or None; activations are constrained to it.
        dtype: The compute dtype: that of the embedding table it was built with.
        embed: The embedding table.
        layers: One block whose parameters are stacks over the layers; it is applied by a scan.
        final_norm: The norm before the head.
        lm_head: The head, or None where it is tied to the embedding table.
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None):
        """Build the module around existing arrays.

        Args:
            config: What it computes.
            params: Arrays (or abstract arrays) by dotted path, as `held` lists them.
            mesh: The mesh they lie on.

        Raises:
            ValueError: The parameters do not fit the configuration; all mismatches are named.
        """
        check_params(config, params)
        self.config = config
        self.mesh = mesh
        self.dtype = jnp.dtype(params["embed.table"].dtype)
        self.embed = Embedding(subtree(params, "embed"))
        self.layers = Block(config, subtree(params, "layers"))
        self.final_norm = RMSNorm(config, subtree(params, "final_norm"))
        self.lm_head = None if config.tie_embeddings else Linear(config, subtree(params, "lm_head"), "lm_head")

    def __call__(
        self,
        tokens: Int32[Integers, "b s"],
        positions: Int32[Integers, "_b _s"] | None = None,
        segment_ids: Int32[Integers, "_b _s"] | None = None,
        *,
        adapters: Adapters | None = None,
        rows: UInt32[Integers, "_b _s"] | None = None,
        remat: str = "none",
        kernels: str = "auto",
    ) -> Float[Array, "b s vocab"]:
        """Logits of the next token at every position, float32.

        Args:
            tokens: Token ids.
            positions: Position of each token in its own document. By default counted from the start of each segment.
            segment_ids: The document of each token: tokens see only their own document. 0 is padding. By default all
                tokens of a row are one document.
            adapters: Adapters by module path (``layers.attention.q``, stacked; ``embed``; ``lm_head``).
            rows: Identity of each position, for dropout; see :func:`jaxtune_kernels.low_rank_matmul`.
            remat: What the backward pass recomputes, one of :data:`REMAT`.
            kernels: What computes products with adapters, one of :data:`jaxtune.models.linear.KERNELS`.

        Raises:
            ValueError: Shapes do not fit, or an adapter's path, the remat policy or the choice of kernels is unknown.
        """
        states = self.hidden(tokens, positions, segment_ids, adapters=adapters, rows=rows, remat=remat, kernels=kernels)
        return self.logits(states, adapters=adapters, rows=rows)

    def hidden(
        self,
        tokens: Int32[Integers, "b s"],
        positions: Int32[Integers, "_b _s"] | None = None,
        segment_ids: Int32[Integers, "_b _s"] | None = None,
        *,
        adapters: Adapters | None = None,
        rows: UInt32[Integers, "_b _s"] | None = None,
        remat: str = "none",
        kernels: str = "auto",
    ) -> Float[Array, "b s d"]:
        """States after the final norm, in the compute dtype; the arguments are those of :meth:`__call__`."""
        without, params = Detached.of(self)
        return without.hidden(
            params, tokens, positions, segment_ids, adapters=adapters, rows=rows, remat=remat, kernels=kernels
        )

    def extend(
        self,
        tokens: Int32[Integers, "b s"],
        cache: Cache,
        segment_ids: Int32[Integers, "_b _s"] | None = None,
        *,
        adapters: Adapters | None = None,
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """States of tokens that follow what the cache holds, and the cache with their keys and values behind it.

        Positions go on from the length of each row. :meth:`logits` makes logits of the states that are of interest,
        usually the last one's.

        Args:
            tokens: Token ids. Prompts of different lengths are padded on the left.
            cache: Keys and values of earlier tokens, which are attended to.
            segment_ids: 0 for padding; by default there is none.
            adapters: As for :meth:`__call__`, without dropout.

        Raises:
            ValueError: Shapes do not fit, or an adapter's path is unknown.
        """
        _check_shapes(tokens, segment_ids=segment_ids)
        _check_adapters(self.config, adapters)
        batch, slots = cache.segment_ids.shape
        if batch != tokens.shape[0] or slots < tokens.shape[1]:
            raise ValueError(f"tokens of shape {tokens.shape} do not fit a cache of {batch} rows × {slots} slots")
        static, params = split(self)
        states, extended = _hidden(
            static, params, tokens, None, segment_ids, dict(adapters or {}), None, cache, "none", "auto"
        )
        assert extended is not None
        return states, extended

    def logits(
        self,
        hidden: Float[Array, "b s d"],
        *,
        adapters: Adapters | None = None,
        rows: UInt32[Integers, "b s"] | None = None,
    ) -> Float[Array, "b s vocab"]:
        """Logits, float32, of states after the final norm: the head and its soft cap."""
        return self.head(adapters=adapters, rows=rows).logits(hidden)

    def head(self, *, adapters: Adapters | None = None, rows: UInt32[Integers, "b s"] | None = None) -> Head:
        """What makes logits, or losses, of states after the final norm; the arguments are those of :meth:`__call__`."""
        kernel = None if self.lm_head is None else self.lm_head.matrix
        return _head(self.config, self.mesh, self.embed.table[...], kernel, adapters, rows)

    def _embedded(self, tokens: Int32[Array, "b s"], adapter: Adapter | None) -> Float[Array, "b s d"]:
        # An id outside of the table gives NaN (the default of take) rather than some other token's embedding.
        x = jnp.take(self.embed.table[...], tokens, axis=0).astype(self.dtype)
        if adapter is not None:
            x = x + adapter.embedding_term(tokens, self.dtype)
        # The table is cut by width over fsdp, and so is what is looked up in it. Rows are cut over data alone first:
        # from there one all-to-all cuts them over fsdp as well, where XLA by itself would copy all of x to each device.
        x = constrain(x, ("replicas", None, "embed"), self.mesh)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, self.dtype)
        return constrain(x, ACTIVATION_AXES, self.mesh)

    def _shared(
        self,
        positions: Int32[Array, "b s"],
        segment_ids: Int32[Array, "#b s"],
        rows: UInt32[Array, "b s"] | None,
        cache: Cache | None,
        kernels: str,
    ) -> Shared:
        """The rotary tables of the kinds of layers that occur, and where the tokens stand among the keys."""
        config = self.config
        slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
        rope, local_rope = config.rope, config.local_rope
        if local_rope is not None and None not in config.windows:
            rope, local_rope = local_rope, None
        if config.window is None:
            local_rope = None
        return Shared(
            table=rotary_table(positions, rope, config.head_dim),
            local_table=None if local_rope is None else rotary_table(positions, local_rope, config.head_dim),
            query_segments=segment_ids,
            key_segments=segment_ids if cache is None else cache.written_segments(segment_ids),
            query_slots=None if cache is None else cache.index + slots,
            rows=rows,
            kernels=kernels,
            mesh=self.mesh,
        )

    def _scanned(
        self, x: Float[Array, "b s d"], shared: Shared, adapters: Adapters, cache: Cache | None, remat: str
    ) -> tuple[Float[Array, "b s d"], tuple[Array, Array] | None]:
        """All layers, and with a cache the new keys and values of each.

        The cache's stacks are read inside the scan and written once behind it: as a carry that each layer writes to,
        XLA copies them whole in every layer.
        """
        block, weights = nnx.split(self.layers)
        own = subtree(adapters, "layers")
        whole = {path: adapter.unscanned() for path, adapter in own.items()}
        layers = Layer(local=jnp.array([window is not None for window in self.config.windows]))

        def body(x: Array, scanned: tuple[Any, Layer, Adapters, Any]) -> tuple[Array, Any]:
            layer_weights, layer, layer_adapters, cached = scanned
            layer_adapters = {path: adapter.joined(whole[path]) for path, adapter in layer_adapters.items()}
            x, written = nnx.merge(block, layer_weights)(x, layer, shared, layer_adapters, cached)
            return constrain(x, ACTIVATION_AXES, self.mesh), None if cached is None else written

        cached = None if cache is None else (cache.keys, cache.values)
        # Nothing is differentiated through a cache.
        body = body if cached else _remat(body, remat, platform(self.mesh))
        stacks = {path: adapter.scanned() for path, adapter in own.items()}
        return lax.scan(body, x, (weights, layers, stacks, cached))


@dataclasses.dataclass(frozen=True)
class Detached:
    """A decoder without its arrays, which are given with every call: what a compiled step holds of it.

    The module is put together once, where its layers are applied.

    Attributes:
        static: Of the module, as :func:`split` gives it.
        config: What it computes.
        mesh: The mesh that its parameters lie on, or None.
    """

    static: nnx.GraphDef[Decoder]
    config: DecoderConfig
    mesh: jax.sharding.Mesh | None

    @classmethod
    def of(cls, model: Decoder) -> tuple[Detached, dict[str, Any]]:
        """The decoder without its arrays, and these."""
        static, params = split(model)
        return cls(static, model.config, model.mesh), params

    def merged(self, params: Params) -> Decoder:
        """The decoder with arrays."""
        return merge(self.static, params)

    def hidden(
        self,
        params: Params,
        tokens: Int32[Integers, "b s"],
        positions: Int32[Integers, "_b _s"] | None = None,
        segment_ids: Int32[Integers, "_b _s"] | None = None,
        *,
        adapters: Adapters | None = None,
        rows: UInt32[Integers, "_b _s"] | None = None,
        noise: EmbeddingNoise | None = None,
        remat: str = "none",
        kernels: str = "auto",
    ) -> Float[Array, "b s d"]:
        """:meth:`Decoder.hidden` with these arrays, and noise on the embeddings, which needs ``rows``."""
        _check_shapes(tokens, positions=positions, segment_ids=segment_ids, rows=rows)
        _check_adapters(self.config, adapters)
        if remat not in REMAT:
            raise ValueError(f"unknown remat policy {remat!r}{nearest(remat, REMAT)}")
        if kernels not in KERNELS:
            raise ValueError(f"unknown kernels {kernels!r}{nearest(kernels, KERNELS)}")
        # Jitted here too, so that a call outside of any jit compiles once and not, for its scan, at each call; and that
        # a step which is traced more than once, for shapes or microbatches, traces the layers once.
        return _hidden(
            self.static,
            dict(params),
            tokens,
            positions,
            segment_ids,
            dict(adapters or {}),
            rows,
            None,
            remat,
            kernels,
            noise,
        )[0]

    def head(
        self, params: Params, *, adapters: Adapters | None = None, rows: UInt32[Integers, "b s"] | None = None
    ) -> Head:
        """:meth:`Decoder.head` with these arrays."""
        return _head(self.config, self.mesh, params["embed.table"], params.get("lm_head.kernel"), adapters, rows)


def _head(
    config: DecoderConfig,
    mesh: jax.sharding.Mesh | None,
    table: Array,
    kernel: Array | None,
    adapters: Adapters | None,
    rows: UInt32[Integers, "b s"] | None,
) -> Head:
    """The head of a table of embeddings, or of a kernel where it is not tied to that."""
    return Head(
        matrix=table if kernel is None else kernel,
        tied=kernel is None,
        soft_cap=config.final_soft_cap,
        adapter=(adapters or {}).get("lm_head"),
        rows=None if rows is None else jnp.asarray(rows),
        mesh=mesh,
    )


def _check_adapters(config: DecoderConfig, adapters: Adapters | None) -> None:
    modules, specs = adaptable_modules(config), declare(config)
    for path, adapter in (adapters or {}).items():
        if path not in modules:
            raise ValueError(f"no module {path!r} to adapt{nearest(path, modules)}")
        *layers, inputs, outputs = specs[modules[path]].shape
        if (misfit := adapter.misfit(tuple(layers), inputs, outputs)) is not None:
            raise ValueError(f"the adapter of {path} has {misfit}")


def _check_shapes(tokens: Integers, **others: Integers | None) -> None:
    for name, value in others.items():
        if value is not None and value.shape != tokens.shape:
            raise ValueError(f"{name} has shape {value.shape}, but tokens has {tokens.shape}")


def _remat(body: Callable, policy: str, platform: str) -> Callable:
    """Wrap the body of the scan over the layers so that its backward pass recomputes what the policy drops.

    ``dots`` keeps the results of projections and of attention: that is all the arithmetic worth keeping. They are named
    rather than found among the matmuls, which would keep both terms of a projection with an adapter and not their sum.

    ``none`` leaves it to jax what is kept, but for CPUs: there, what is made of projections element by element (norms,
    the MLP's product of gate and up) is made again, as the backward pass makes most of it for its own derivatives
    anyway. Written to the scan's stacks and read from them it takes a tenth of a step there, and a quarter of its
    memory. What attention takes, which is rotated and transposed, is kept.
    """
    if policy == "none" and platform != "cpu":
        return body
    kept = {"none": (*_PRODUCTS, HEADS), "dots": _PRODUCTS, "full": ()}[policy]
    saved = jax.checkpoint_policies.save_only_these_names(*kept) if kept else None
    # A scan's body is compiled on its own, so there is nothing for common-subexpression elimination to undo.
    return jax.checkpoint(body, policy=saved, prevent_cse=False)


@functools.partial(jax.jit, static_argnames=("static", "remat", "kernels"))
def _hidden(
    static: nnx.GraphDef[Decoder],
    params: Params,
    tokens: Int32[Array, "b s"],
    positions: Int32[Array, "b s"] | None,
    segment_ids: Int32[Array, "b s"] | None,
    adapters: dict[str, Adapter],
    rows: UInt32[Array, "b s"] | None,
    cache: Cache | None,
    remat: str,
    kernels: str,
    noise: EmbeddingNoise | None = None,
) -> tuple[Float[Array, "b s d"], Cache | None]:
    """States after the final norm, and the cache after the call."""
    model = merge(static, params)
    segments = segment_ids
    if segments is None:
        # One row stands for all where there are no documents to tell apart: the attention bias stays small.
        segments = jnp.ones((1 if cache is None else tokens.shape[0], tokens.shape[1]), jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(_default_positions(segments, cache), tokens.shape)
    shared = model._shared(positions, segments, rows, cache, kernels)
    embedded = model._embedded(tokens, adapters.get("embed"))
    if noise is not None:
        assert rows is not None
        embedded = noise.on(embedded, rows)
    x, written = model._scanned(embedded, shared, adapters, cache, remat)
    states = model.final_norm(x)
    if cache is None or written is None:
        return states, None
    return states, cache.advanced(written, segments)


def _default_positions(segments: Int32[Array, "b s"], cache: Cache | None) -> Int32[Array, "b s"]:
    """Counted from the start of each segment; with a cache, going on from the number of tokens of the row so far."""
    if cache is not None:
        counted = jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1
        return jnp.maximum(cache.lengths[:, None] + counted, 0)
    return segment_positions(segments)


def segment_positions(segments: Int32[Array, "b s"]) -> Int32[Array, "b s"]:
    """Positions counted from the start of each segment of a row."""
    slots = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return slots - lax.cummax(jnp.where(starts, slots, 0), axis=1)


def segment_lengths(segments: Int32[Array, "b s"]) -> Int32[Array, "b s"]:
    """The length of the segment of each position."""
    slots = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    last = jnp.concatenate([segments[:, 1:] != segments[:, :-1], jnp.ones_like(segments[:, :1], bool)], axis=1)
    ends = lax.cummin(jnp.where(last, slots, segments.shape[1]), axis=1, reverse=True)
    return ends - slots + segment_positions(segments) + 1


def split(model: Decoder) -> tuple[nnx.GraphDef[Decoder], dict[str, Any]]:
    """The module as a static, hashable part and its :data:`Params` (abstract ones if it was built around such).

    Done once outside ``jax.jit``; inside, :func:`merge` puts any parameters of the same paths back, at no cost.
    """
    static, state = nnx.split(model)
    flat: dict[str, Any] = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep=".")
    return static, {path: flat[path] for path in held(model.config)}


def merge(static: nnx.GraphDef[Decoder], params: Mapping[str, Any]) -> Decoder:
    """The decoder whose static part :func:`split` gave, with these parameters (arrays, tracers or abstract arrays)."""
    return nnx.merge(static, traverse_util.unflatten_dict(dict(params), sep="."))
