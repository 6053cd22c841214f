"""The key-value cache of generation: fixed size, stacked over layers like the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jaxtune.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, init=False)
class Cache:
    """Keys and values of the slots written so far. A pytree; every row writes at the same index.

    Prompts are padded on the left (segment 0), so all rows of a batch end at the same slot and go on from there.

    Attributes:
        keys: Rotated keys. Heads come before slots, so that a step needs no transposed copy.
        values: Values.
        segment_ids: Segment of each slot; 0 is padding or not yet written.
        lengths: Number of tokens, without padding, of each row so far: the position of its next token.
        index: The slot that is written next. Writing past the last slot is the caller's mistake and not noticed
            inside ``jax.jit``, where the index is not known.
    """

    keys: Float[Array, "layers b kv slots d"]
    values: Float[Array, "layers b kv slots d"]
    segment_ids: Int32[Array, "b slots"]
    lengths: Int32[Array, " b"]
    index: Int32[Array, ""]

    # Leaves are not annotated: jax also builds this tree with shapes, shardings, axes or placeholders for leaves.
    def __init__(self, keys: Any, values: Any, segment_ids: Any, lengths: Any, index: Any) -> None:
        for name, value in (
            ("keys", keys),
            ("values", values),
            ("segment_ids", segment_ids),
            ("lengths", lengths),
            ("index", index),
        ):
            object.__setattr__(self, name, value)

    @property
    def slots(self) -> int:
        """Number of slots of each row."""
        return self.segment_ids.shape[-1]

    def written_segments(self, segment_ids: Int32[Array, "b s"]) -> Int32[Array, "b slots"]:
        """The segments of all slots once tokens of these segments are written."""
        return lax.dynamic_update_slice(self.segment_ids, segment_ids, (jnp.zeros((), jnp.int32), self.index))

    def advanced(self, written: tuple[Array, Array], segment_ids: Int32[Array, "b s"]) -> Cache:
        """The cache after tokens of these segments, whose keys and values are ``written`` (stacked over layers)."""
        return Cache(
            keys=write_slots(self.keys, written[0], self.index),
            values=write_slots(self.values, written[1], self.index),
            segment_ids=self.written_segments(segment_ids),
            lengths=self.lengths + jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32),
            index=self.index + segment_ids.shape[1],
        )


jax.tree_util.register_dataclass(
    Cache, data_fields=["keys", "values", "segment_ids", "lengths", "index"], meta_fields=[]
)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache for ``batch`` rows of at most ``length`` slots, padding included, in the compute dtype."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def write_slots(
    old: Float[Array, "*layers b kv slots hd"], new: Float[Array, "*layers b kv s hd"], index: Int32[Array, ""]
) -> Float[Array, "*layers b kv slots hd"]:
    """Keys or values, of one layer or stacked, with ``new`` written from slot ``index`` on."""
    return lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=-2)
