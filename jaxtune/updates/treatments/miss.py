"""MiSS (arXiv:2409.15371, first called Bone): one trained matrix behind fixed sums of the inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import BesideAdapter, PositiveInt, Probability, Traced
from jaxtune.late import TYPES, jnp, np
from jaxtune.updates.treatments.base import NO_RULE, Arrays, Exported, Trained, Values
from jaxtune.updates.treatments.low_rank import LowRank

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Key, UInt32

    from jaxtune.models.linear import LowRankAdapter


class MissRule(RuleConfig):
    """Linear layers that get a trained matrix behind sums of their inputs (MiSS, arXiv:2409.15371)."""

    method: Literal["miss"] = Field(
        default="miss", description="These linear layers get a trained matrix behind sums of their inputs."
    )
    rank: Annotated[PositiveInt, Traced(capacity=True)] = Field(
        default=64, description="Number of sums, and rows of the matrix."
    )
    dropout: Annotated[Probability, Traced(), BesideAdapter()] = Field(
        default=0.0, description="Share of the inputs that are left out of the sums in a training step."
    )


class Miss(LowRank):
    """``y = x W + pool(x) D + bias``: sum k of the pool is that of the inputs i with i ≡ k (mod rank); D starts at 0.

    It is a low-rank term whose A is made of zeros and ones and whose scale is 1.
    """

    Section = MissRule
    peft_type = "MISS"

    def arrays(self) -> Arrays:
        """D."""
        return {"d": super().arrays()["b"]}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """D at zero."""
        del key, base, values
        return {"d": jnp.zeros(self.arrays()["d"].shape, jnp.float32)}, {}

    def scale(self, values: Values) -> Float[Array, " layers"]:
        """1 where there is a rule."""
        del values
        return jnp.array([float(index != NO_RULE) for index in self.rules], jnp.float32)

    def adapter(
        self, arrays: Mapping[str, Float[Array, "..."]], values: Values, dropout_seed: UInt32[Array, ""] | None
    ) -> LowRankAdapter:
        """The sums as a matrix."""
        rank = jnp.maximum(self.gathered("rank", values), 1.0).astype(jnp.int32)
        summed = jnp.arange(self.inputs)[:, None] % rank[:, None, None] == jnp.arange(self.capacity)
        pool = self.of_layers(summed.astype(jnp.float32))
        return super().adapter({"a": pool, "b": arrays["d"]}, values, dropout_seed)

    def settled(self, index: int) -> dict[str, Any]:
        """The rank."""
        section: Any = self.sections[index]
        return {"rank": section.rank}

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The rows of D up to the rank."""
        for each in super().sizes(values):
            yield dataclasses.replace(each, parameters=each.parameters * self.outputs // (self.inputs + self.outputs))

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """D (rank, out)."""
        del fixed
        for layer, index in enumerate(self.rules):
            if index != NO_RULE:
                rank = int(self.value(index, "rank", values))
                d = arrays["d"][layer] if self.layered else arrays["d"]
                config = {"r": rank, "miss_dropout": 0.0, "init_weights": True, "bias": "none"}
                tensors = {"miss_block": np.ascontiguousarray(d[:rank])}
                yield Exported(self.path, layer if self.layered else None, tensors, config)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """A MiSS without blocks of its variants."""
        return config.get("init_weights") is True

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """The rank."""
        del module
        return {"rank": config["r"]}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """D."""
        d = np.zeros((len(self.rules), self.capacity, self.outputs), np.float32)
        for layer, held in tensors.items():
            d[layer, : len(held["miss_block"])] = held["miss_block"]
        return {"d": d if self.layered else d[0]}, {}
