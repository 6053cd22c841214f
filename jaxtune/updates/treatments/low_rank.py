"""LoRA (arXiv:2106.09685): a trained low-rank term beside a frozen linear layer.

A module's term is one stack over all layers, whatever rules its layers match. Rank, alpha and dropout are vectors
over the layers, gathered from the hyperparameters; a layer's rank is a mask over the columns of A up to the capacity,
so that another rank is another number and not another program. A masked column of A gives nothing, and gives its row of
B no gradient.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import BesideAdapter, PositiveInt, Probability, Traced
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import (
    NO_RULE,
    Arrays,
    Effect,
    Exported,
    LinearTreatment,
    Room,
    Trained,
    Values,
)

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Key, UInt32

    from jaxtune.models.linear import LowRankAdapter


class RankRule(RuleConfig):
    """Linear layers that get a trained low-rank term, of whatever kind."""

    rank: Annotated[PositiveInt, Traced(capacity=True)] = Field(
        default=16, description="Rank of the term: columns of A and rows of B."
    )
    alpha: Annotated[float, Field(gt=0), Traced()] = Field(
        default=32.0, description="The term is scaled by alpha / rank, by alpha / sqrt(rank) in rsLoRA."
    )
    dropout: Annotated[Probability, Traced(), BesideAdapter()] = Field(
        default=0.0, description="Share of the term's inputs that are left out of a training step."
    )

    @property
    def rooted(self) -> bool:
        """Whether the term is scaled by alpha / sqrt(rank) (arXiv:2312.03732)."""
        return False


class LowRankRule(RankRule):
    """Linear layers that get a trained low-rank term (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732)."""

    method: Literal["low_rank"] = Field(
        default="low_rank", description="These linear layers get a trained low-rank term."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")

    @property
    def rooted(self) -> bool:
        """As the key says."""
        return self.use_rslora


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(LinearTreatment):
    """A linear module with a low-rank term.

    Attributes:
      capacity: the largest rank that there is room for.
    """

    Section = LowRankRule
    serves_head = True
    peft_type = "LORA"

    capacity: int

    @classmethod
    def sized(cls, sections: Mapping[int, Any], capacity: Mapping[str, int]) -> dict[str, Any]:
        """The capacity: the largest rank of a rule, or what is asked for."""
        return {
            "capacity": max(
                max(section.rank, capacity.get(f"update.{index}.rank", 0)) for index, section in sections.items()
            )
        }

    def arrays(self) -> Arrays:
        """A and B."""
        inputs, outputs = (self.axes[0], self.inputs), (self.axes[1], self.outputs)
        rank = ("rank", self.capacity)
        return {"a": self.stacked(inputs, rank), "b": self.stacked(rank, outputs)}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """A and B at the start: B is zero, A is uniform in ±1 / sqrt(inputs), which is what PEFT draws.

        A column's values depend on the key, the module, the layer and the column alone: a larger capacity adds columns
        and changes none.
        """
        del base, values
        bound = 1.0 / math.sqrt(self.inputs)
        a = self.drawn(
            key, self.capacity, lambda one: jax.random.uniform(one, (self.inputs,), jnp.float32, -bound, bound)
        )
        return {"a": a, "b": jnp.zeros(LowRank.arrays(self)["b"].shape, jnp.float32)}, {}

    def scale(self, values: Values) -> Float[Array, " layers"]:
        """The factor on A B for each layer: alpha / rank, or alpha / sqrt(rank); 0 where there is no rule."""
        rank = jnp.maximum(self.gathered("rank", values), 1.0)
        rooted = np.array([index != NO_RULE and self.is_rooted(index) for index in self.rules])
        return self.gathered("alpha", values) / jnp.where(rooted, jnp.sqrt(rank), rank)

    def is_rooted(self, index: int) -> bool:
        """Whether a rule scales by the root of the rank (arXiv:2312.03732)."""
        section: Any = self.sections[index]
        return section.rooted

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """The term beside the layer's own product."""
        del base, fixed
        return Effect(adapters={self.path: self.adapter(arrays, values, seed)})

    def adapter(
        self, arrays: Mapping[str, Float[Array, "..."]], values: Values, dropout_seed: UInt32[Array, ""] | None
    ) -> LowRankAdapter:
        """What the model is given: masked A, B, scale, and dropout where there is a seed.

        Each layer of each module draws with a seed of its own.
        """
        from jaxtune_kernels import hash_words

        from jaxtune.models.linear import LowRankAdapter

        active = jnp.arange(self.capacity) < self.columns(arrays, values)[:, None, None]
        scale = self.scale(values)
        rate = seed = None
        if dropout_seed is not None:
            rate = self.gathered("dropout", values)
            layers = jnp.arange(len(self.rules), dtype=jnp.uint32)
            seed = hash_words(dropout_seed, zlib.crc32(self.path.encode()), layers)
            rate, seed = self.of_layers(rate), self.of_layers(seed)
        return LowRankAdapter(arrays["a"] * self.of_layers(active), arrays["b"], self.of_layers(scale), rate, seed)

    def columns(self, arrays: Mapping[str, Array], values: Values) -> Float[Array, " layers"]:
        """So many columns of A are in use in each layer."""
        del arrays
        return self.gathered("rank", values)

    def ranks(self, values: Values) -> tuple[int, ...]:
        """The rank in use in each layer, on the host; 0 where there is no rule."""
        return tuple(0 if index == NO_RULE else int(self.value(index, "rank", values)) for index in self.rules)

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The columns of A and rows of B up to the rank."""
        for rule, layers in self.layers_by_rule():
            rank = int(self.value(rule, "rank", values))
            size = rank * (self.inputs + self.outputs) * len(layers)
            method = f"{self.sections[rule].method} {rank}"
            yield Trained(rule, self.path, layers if self.layered else None, size, method, added=True)

    def check(self, values: Values) -> None:
        """Every rank lies between 1 and the capacity."""
        for index, rank in zip(self.rules, self.ranks(values), strict=True):
            if index != NO_RULE and not 1 <= rank <= self.capacity:
                raise UserError(f"update.{index}.rank: {rank} is not between 1 and the capacity {self.capacity}")

    def rooms(self) -> dict[str, Room]:
        """Of each rule's rank; a product of two matrices has no larger one than the smallest of their sides."""
        room = Room(self.capacity, min(self.inputs, self.outputs))
        return {f"update.{rule}.rank": room for rule in self.used_rules}

    def flops(self, values: Values) -> dict[str, float]:
        """Of the products with A and B, by the rank averaged over the layers."""
        ranks = self.ranks(values)
        layers = len(self.rules)
        return {self.path: 2.0 * (sum(ranks) / layers) * (self.outputs + self.inputs) * layers}

    def settled(self, index: int) -> dict[str, Any]:
        """Rank and scale."""
        section: Any = self.sections[index]
        rank = section.rank
        return {"rank": rank, "scale": section.alpha / (math.sqrt(rank) if self.is_rooted(index) else rank)}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """A (rank, in) and B (out, rank) of each layer, up to its rank."""
        del fixed
        for layer, index in enumerate(self.rules):
            if index == NO_RULE:
                continue
            rank = int(self.value(index, "rank", values))
            a, b = (arrays[part][layer] if self.layered else arrays[part] for part in "ab")
            config = {
                "r": rank,
                "lora_alpha": float(self.value(index, "alpha", values)),
                "lora_dropout": float(self.value(index, "dropout", values)),
                "use_rslora": self.is_rooted(index),
            }
            tensors = {
                "lora_A.weight": np.ascontiguousarray(a[:, :rank].T),
                "lora_B.weight": np.ascontiguousarray(b[:rank].T),
            }
            yield Exported(self.path, layer if self.layered else None, tensors, config)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """A LoRA that is nothing more, as those are written which differ in their training alone."""
        return cls is LowRank and not config.get("use_dora")

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """Rank, alpha and dropout."""
        from jaxtune.updates.peft.format import AdapterConfig

        read = AdapterConfig.model_validate(config)
        told = {"rank": read.rank(module), "alpha": read.alpha(module), "dropout": read.lora_dropout}
        return {**told, "use_rslora": read.use_rslora}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """A and B; columns above a module's rank are zero."""
        a = np.zeros((len(self.rules), self.inputs, self.capacity), np.float32)
        b = np.zeros((len(self.rules), self.capacity, self.outputs), np.float32)
        for layer, held in tensors.items():
            rank = len(held["lora_A.weight"])
            a[layer, :, :rank], b[layer, :rank] = held["lora_A.weight"].T, held["lora_B.weight"].T
        return {"a": self.of_layers(a), "b": self.of_layers(b)}, {}
