"""Prompt tuning (arXiv:2104.08691): trained vectors in front of each document, and a model that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import BesideAdapter, PositiveInt
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import Arrays, Effect, Exported, Shape, Values
from jaxtune.updates.treatments.table import TABLE, TableTreatment

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Key, UInt32

TENSOR = "prompt_embeddings"
"""Its name in a PEFT adapter."""


class PromptTuningRule(RuleConfig):
    """Vectors in front of each document are trained (arXiv:2104.08691)."""

    method: Literal["prompt_tuning"] = Field(
        default="prompt_tuning", description="Vectors in front of each document are trained; match embed."
    )
    length: PositiveInt = Field(default=20, description="So many vectors, which take as many positions of a row.")
    tokens: Annotated[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None, BesideAdapter()] = (
        Field(
            default=None,
            description="Ids of tokens whose embeddings they start as, over and over; drawn from all tokens if unset.",
        )
    )

    @property
    def virtual_tokens(self) -> int:
        """As many as there are vectors."""
        return self.length


class PromptTuning(TableTreatment):
    """The first positions of each document have the vectors for embeddings.

    Rows of data leave room for them: positions in front of each document, whose tokens do not matter, without losses.
    """

    Section = PromptTuningRule
    place = "embed"
    alone = "PROMPT_TUNING"

    def arrays(self) -> Arrays:
        """The vectors."""
        return Shape((self.rule.length, self.shape[1]), (None, self.axes[1]))

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Embeddings of the rule's tokens, or of tokens drawn by the key, each by its place."""
        del values
        length, tokens = self.rule.length, self.rule.tokens
        if tokens is None:
            own = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(length))
            chosen = jax.vmap(lambda one: jax.random.randint(one, (), 0, self.shape[0]))(own)
        else:
            chosen = jnp.array([tokens[place % len(tokens)] for place in range(length)])
        return base[TABLE][chosen].astype(jnp.float32), {}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """What the decoder puts there."""
        del base, fixed, values, seed
        from jaxtune.models.linear import SoftPrompt

        return Effect(adapters={self.path: SoftPrompt(arrays)})

    def settled(self, index: int) -> dict[str, Any]:
        """The number of vectors."""
        del index
        return {"length": self.rule.length}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """The vectors, which stand once and in no module."""
        del fixed, values
        length, width = self.arrays().shape
        config = {
            "num_virtual_tokens": length,
            "token_dim": width,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
        yield Exported("", None, {TENSOR: np.ascontiguousarray(arrays)}, config)

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """The number of vectors."""
        del module
        return {"length": config["num_virtual_tokens"]}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """The vectors."""
        return tensors[0][TENSOR].astype(np.float32), {}
