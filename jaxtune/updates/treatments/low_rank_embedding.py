"""LoRA (arXiv:2106.09685) of the embedding table: a trained low-rank term beside what is looked up in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import PositiveInt, Traced
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import Arrays, Exported, Matched, Values
from jaxtune.updates.treatments.low_rank import LowRank
from jaxtune.updates.treatments.table import TABLE, TableTreatment

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Key, UInt32

    from jaxtune.models.linear import LowRankAdapter


class LowRankEmbeddingRule(RuleConfig):
    """The embedding table gets a trained low-rank term (LoRA, arXiv:2106.09685)."""

    method: Literal["low_rank_embedding"] = Field(
        default="low_rank_embedding", description="The embedding table gets a trained low-rank term."
    )
    rank: Annotated[PositiveInt, Traced(capacity=True)] = Field(
        default=16, description="Rank of the term: columns of A, which has a row for each token, and rows of B."
    )
    alpha: Annotated[float, Field(gt=0), Traced()] = Field(
        default=32.0, description="The term is scaled by alpha / rank, or by alpha / sqrt(rank)."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")

    @property
    def rooted(self) -> bool:
        """As the key says."""
        return self.use_rslora

    @property
    def dropout(self) -> float:
        """None: there are no inputs to drop."""
        return 0.0


class LowRankEmbedding(LowRank):
    """The embedding of a token t is ``E[t] + s · A[t] B``, and a family's factor on embeddings is on both.

    A head that is tied to the table has the table alone, as in PEFT: a term of the embeddings is none of the logits.
    There is no dropout, as there are no inputs to drop: PEFT ignores it here.
    """

    Section = LowRankEmbeddingRule
    needs = TableTreatment.needs
    serves_head = False

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """The table alone."""
        return array.path == TABLE

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """A is zero and B standard normal, which is what PEFT draws; each row of B by a key of its own."""
        del base, values
        b = self.drawn(key, self.capacity, lambda one: jax.random.normal(one, (self.outputs,), jnp.float32))
        return {"a": jnp.zeros((self.inputs, self.capacity), jnp.float32), "b": b.T}, {}

    def adapter(
        self, arrays: Mapping[str, Float[Array, "..."]], values: Values, dropout_seed: UInt32[Array, ""] | None
    ) -> LowRankAdapter:
        """Without dropout."""
        del dropout_seed
        return super().adapter(arrays, values, None)

    def flops(self, values: Values) -> dict[str, float]:
        """Of the product with B; rows of A are looked up."""
        (rank,) = self.ranks(values)
        return {self.path: 2.0 * rank * self.outputs}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """A (rank, tokens) and B (width, rank); never the table itself, which is the base's."""
        for each in super().tensors(arrays, fixed, values):
            a, b = (each.tensors[f"lora_{name}.weight"] for name in "AB")
            yield Exported(self.path, None, {"lora_embedding_A": a, "lora_embedding_B": b}, each.config)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """A LoRA that is nothing more."""
        return not config.get("use_dora")

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """Rank and alpha."""
        told = super().read_section(config, module)
        return {name: told[name] for name in ("rank", "alpha", "use_rslora")}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """A and B; columns above the rank are zero."""
        held = tensors[0]
        return super().restored({0: {f"lora_{name}.weight": held[f"lora_embedding_{name}"] for name in "AB"}})
