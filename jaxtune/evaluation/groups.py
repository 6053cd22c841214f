"""What the decode loop asks of a model: for rows that share one state, and for groups of rows of a state each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtune.models.cache import Cache, init_cache
from jaxtune.models.decoder import Decoder
from jaxtune.models.linear import Adapter
from jaxtune.parallel.sharding import TRIAL_AXIS

_CACHE_AXES = Cache(keys=1, values=1, segment_ids=0, lengths=0, index=None)
"""Where a cache of groups has their axis: behind the layers, which are scanned, so that no step moves it there."""


class Rows:
    """Rows of one model with one set of adapters.

    Args:
      model: the model.
      adapters: by module path.
    """

    def __init__(self, model: Decoder, adapters: dict[str, Adapter]):
        self._model, self._adapters = model, adapters

    def empty_cache(self, rows: int, length: int) -> Cache:
        """A cache for so many rows of at most ``length`` slots."""
        return init_cache(self._model.config, rows, length, self._model.dtype)

    def extend(
        self, tokens: Int32[Array, "b s"], cache: Cache, segments: Int32[Array, "b s"] | None = None
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """See :meth:`jaxtune.models.decoder.Decoder.extend`."""
        return self._model.extend(tokens, cache, segments, adapters=self._adapters)

    def logits(self, states: Float[Array, "b s d"]) -> Float[Array, "b s vocab"]:
        """See :meth:`jaxtune.models.decoder.Decoder.logits`."""
        return self._model.logits(states, adapters=self._adapters)


class GroupedRows:
    """Groups of rows, each with the adapters of one of several states, over one copy of the model.

    Products with the model's own kernels are those of all rows at once; low-rank products are batched over groups. All
    groups stand at the same slot of their caches.

    Args:
      model: the model, held in common.
      adapters: by module path, of all states: every array has a leading axis of states.
      owners: the state of each group.
      mesh: that the model lies on; over its trial axis groups are cut.
    """

    def __init__(
        self,
        model: Decoder,
        adapters: dict[str, Adapter],
        owners: Int32[Array, " groups"],
        mesh: jax.sharding.Mesh | None,
    ):
        self._model, self._owners = model, owners
        self._axis = TRIAL_AXIS if mesh is not None and mesh.shape.get(TRIAL_AXIS, 1) > 1 else None
        # Behind the layers as well, once for the whole loop.
        self._axes = {path: one.batch_axes(int(path.startswith("layers."))) for path, one in adapters.items()}
        self._adapters = {
            path: jax.tree.map(
                lambda axis, leaves: jax.tree.map(lambda leaf: jnp.moveaxis(leaf[owners], 0, axis), leaves),
                self._axes[path],
                adapter,
            )
            for path, adapter in adapters.items()
        }

    def empty_cache(self, rows: int, length: int) -> Cache:
        """A cache for so many rows of each group, of at most ``length`` slots."""

        def make(_: Array) -> Cache:
            return init_cache(self._model.config, rows, length, self._model.dtype)

        return jax.vmap(make, out_axes=_CACHE_AXES)(self._owners)

    def extend(
        self,
        tokens: Int32[Array, "groups b s"],
        cache: Cache,
        segments: Int32[Array, "groups b s"] | None = None,
    ) -> tuple[Float[Array, "groups b s d"], Cache]:
        """See :meth:`jaxtune.models.decoder.Decoder.extend`."""

        def extend(adapters: Any, tokens: Array, cache: Cache, segments: Array | None) -> tuple[Array, Cache]:
            return self._model.extend(tokens, cache, segments, adapters=adapters)

        each = None if segments is None else 0
        mapped = self._mapped(extend, (self._axes, 0, _CACHE_AXES, each), (0, _CACHE_AXES))
        return mapped(self._adapters, tokens, cache, segments)

    def logits(self, states: Float[Array, "groups b s d"]) -> Float[Array, "groups b s vocab"]:
        """See :meth:`jaxtune.models.decoder.Decoder.logits`."""

        def logits(adapters: Any, states: Array) -> Array:
            return self._model.logits(states, adapters=adapters)

        return self._mapped(logits, (self._axes, 0), 0)(self._adapters, states)

    def _mapped(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=inputs, out_axes=outputs, spmd_axis_name=self._axis)
