"""Several adapters on one base, of one shape, so that changing from one to another compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError, nearest
from jaxtune.models.declarations import Params
from jaxtune.models.linear import Adapter, LowRankAdapter


class AdapterSet(Mapping[str, tuple[Params, dict[str, Adapter]]]):
    """Adapters by name: ``adapters["support"]`` is what ``jaxtune.generate`` takes, as ``trainer.apply(state)`` is.

    All are padded with zeros to the modules and the largest ranks of all of them, which changes no result.

    Args:
      params: of the base, which all share.
      adapters: of each name, by module path; without dropout.

    Raises:
      UserError: one of the adapters is of another kind than LoRA's.

    Attributes:
      params: the same.
      stacked: by module path, every array with a leading axis: the adapters in the order of their names, then nothing.
    """

    def __init__(self, params: Params, adapters: Mapping[str, Mapping[str, Adapter]]):
        self.params = params
        self._names = tuple(adapters)
        examples: dict[str, list[LowRankAdapter]] = {}
        low_rank: dict[str, dict[str, LowRankAdapter]] = {name: {} for name in adapters}
        for name, each in adapters.items():
            for path, adapter in each.items():
                if not isinstance(adapter, LowRankAdapter):
                    raise UserError(
                        f"adapter {name!r}: what it has on {path} is no plain LoRA, and only these stand beside "
                        f"others; take it by itself (jaxtune.load_adapter)"
                    )
                low_rank[name][path] = adapter
                examples.setdefault(path, []).append(adapter)
        self.stacked: dict[str, Adapter] = {
            path: _stacked([each.get(path) for each in low_rank.values()], of) for path, of in examples.items()
        }

    def __getitem__(self, name: str) -> tuple[Params, dict[str, Adapter]]:
        """The base's parameters and the adapter of a name."""
        place = self._names.index(name) if name in self._names else None
        if place is None:
            raise KeyError(name)
        return self.params, jax.tree.map(lambda leaf: leaf[place], self.stacked)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)

    def places(self, names: Sequence[str | None]) -> list[int]:
        """Where names stand in :attr:`stacked`; None, the base alone, at its end.

        Raises:
          UserError: there is no adapter of a name.
        """
        for name in names:
            if name is not None and name not in self._names:
                raise UserError(f"adapter_names: there is no adapter {name!r}{nearest(name, self._names)}")
        return [len(self._names) if name is None else self._names.index(name) for name in names]


def _stacked(adapters: Sequence[LowRankAdapter | None], present: Sequence[LowRankAdapter]) -> LowRankAdapter:
    """Adapters of one module, and one that adds nothing, padded to the largest rank."""
    rank = max(each.a.shape[-1] for each in present)
    nothing = jax.tree.map(jnp.zeros_like, present[0])

    def padded(leaf: Any, axis: int) -> Any:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, rank - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    filled = [nothing if each is None else each for each in (*adapters, None)]
    return LowRankAdapter(
        jnp.stack([padded(each.a, -1) for each in filled]),
        jnp.stack([padded(each.b, -2) for each in filled]),
        jnp.stack([jnp.asarray(each.scale) for each in filled]),
    )
