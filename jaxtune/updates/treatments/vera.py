"""VeRA (arXiv:2310.11454): one random pair of matrices for all layers, and trained factors of its ranks and outputs."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import PositiveInt, Traced
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import (
    NO_RULE,
    Arrays,
    Effect,
    Exported,
    Matched,
    Shape,
    Trained,
    Treatment,
    Values,
)
from jaxtune.updates.treatments.low_rank import LowRank

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Key, UInt32

    from jaxtune.models.linear import AdaptedLayer

_FIRST = 0.1


class VeraRule(RuleConfig):
    """Linear layers that get trained factors of a random low-rank term that all share (VeRA, arXiv:2310.11454)."""

    method: Literal["vera"] = Field(
        default="vera", description="These linear layers get trained factors of a random term that all share."
    )
    rank: Annotated[PositiveInt, Traced(capacity=True)] = Field(
        default=256, description="Rank of the term: columns of A and rows of B."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Vera(LowRank):
    """``y = x W + λ_b ∘ ((λ_d ∘ x A) B) + bias``: A and B are drawn and stay, λ_d starts at 0.1 and λ_b at 0.

    A module has as many rows of A, and columns of B, as it has inputs and outputs; those that two modules have are the
    same. A is uniform in ±√(6 / inputs) of the module that has most, B in ±√(6 / rank).

    Attributes:
      most: inputs of the module that has most.
    """

    Section = VeraRule
    serves_head = False
    peft_type = "VERA"

    most: int = 0

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """One for each module."""
        most = max((array.shape[-2] for array in arrays), default=0)
        for part in super().treat(arrays, sections, capacity):
            assert isinstance(part, Vera)
            yield dataclasses.replace(part, most=most)

    def arrays(self) -> Arrays:
        """The factors."""
        return {"d": self.stacked(("rank", self.capacity)), "b": self.stacked((self.axes[1], self.outputs))}

    def fixed(self) -> Arrays:
        """A and B, of all layers."""
        return {
            "a": Shape((self.inputs, self.capacity), (self.axes[0], "rank")),
            "b": Shape((self.capacity, self.outputs), ("rank", self.axes[1])),
        }

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """By keys of inputs, outputs and ranks, so that modules have the same of each."""
        del base, values
        shapes = self.arrays()

        def drawn(name: bytes, count: int) -> Array:
            own = jax.random.fold_in(key, zlib.crc32(name))

            def number(place: Array, rank: Array) -> Array:
                return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(own, place), rank), (), minval=-1.0)

            rows = jax.vmap(jax.vmap(number, in_axes=(None, 0)), in_axes=(0, None))
            return rows(jnp.arange(count), jnp.arange(self.capacity))

        a = drawn(b"vera.a", self.inputs) * math.sqrt(6.0 / self.most)
        b = drawn(b"vera.b", self.outputs).T * math.sqrt(6.0)
        factors = {"d": jnp.full(shapes["d"].shape, _FIRST, jnp.float32), "b": jnp.zeros(shapes["b"].shape)}
        return factors, {"a": a, "b": b}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """The factors of ranks in use; B by the root of their number."""
        del base, seed
        from jaxtune.models.linear import ArraysAdapter

        rank = self.gathered("rank", values)[:, None]
        used = (jnp.arange(self.capacity) < rank) / jnp.sqrt(jnp.maximum(rank, 1.0))
        own = {"d": arrays["d"] * self.of_layers(used), "b": arrays["b"]}
        return Effect(adapters={self.path: ArraysAdapter(_product, own, fixed)})

    def settled(self, index: int) -> dict[str, Any]:
        """The rank."""
        section: Any = self.sections[index]
        return {"rank": section.rank}

    def sizes(self, values: Values) -> Iterator[Trained]:
        """A factor of each rank in use, and of each output."""
        for each in super().sizes(values):
            rank = int(self.value(each.rule, "rank", values))
            layers = 1 if each.layers is None else len(each.layers)
            yield dataclasses.replace(each, parameters=(rank + self.outputs) * layers)

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """``vera_lambda_d`` and ``vera_lambda_b`` of each layer, and A and B once."""
        for layer, index in enumerate(self.rules):
            if index != NO_RULE:
                rank = int(self.value(index, "rank", values))
                config = {
                    "r": rank,
                    "d_initial": _FIRST,
                    "projection_prng_key": 0,
                    "save_projection": True,
                    "vera_dropout": 0.0,
                    "bias": "none",
                }
                d, b = (arrays[name][layer] if self.layered else arrays[name] for name in "db")
                tensors = {
                    "vera_lambda_d": np.ascontiguousarray(d[:rank]),
                    "vera_lambda_b": np.ascontiguousarray(b),
                }
                yield Exported(self.path, layer if self.layered else None, tensors, config)
                shared = {
                    "vera_A": np.ascontiguousarray(fixed["a"][:, :rank].T),
                    "vera_B": np.ascontiguousarray(fixed["b"][:rank].T / np.float32(math.sqrt(rank))),
                }
                yield Exported("", None, shared, config)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """One that brings its matrices."""
        return bool(config.get("save_projection"))

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """The rank."""
        del module
        return {"rank": config["r"]}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """The factors, and this module's part of A and B."""
        d = np.zeros((len(self.rules), self.capacity), np.float32)
        b = np.zeros((len(self.rules), self.outputs), np.float32)
        held: Mapping[str, np.ndarray] = {}
        for layer, held in tensors.items():
            d[layer, : len(held["vera_lambda_d"])], b[layer] = held["vera_lambda_d"], held["vera_lambda_b"]
        rank = len(held["vera_lambda_d"])
        shared = {"a": held["vera_A"][:, : self.inputs].T, "b": held["vera_B"][: self.outputs].T * math.sqrt(rank)}
        fixed = {name: np.ascontiguousarray(value, np.float32) for name, value in shared.items()}
        return {"d": self.of_layers(d), "b": self.of_layers(b)}, fixed


def _product(layer: AdaptedLayer) -> Float[Array, "..."]:
    from jaxtune.models.linear import LowRankAdapter

    a, b = layer.whole["a"] * layer.arrays["d"], layer.whole["b"] * layer.arrays["b"]
    return LowRankAdapter(a, b, jnp.float32(1.0)).product(layer.frozen)
