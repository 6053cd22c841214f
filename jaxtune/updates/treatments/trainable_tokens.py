"""The embeddings of few tokens, new ones or those that a task gives another meaning, and of no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jnp, np
from jaxtune.updates.treatments.base import Arrays, Effect, Exported, Matched, Shape, Trained, Treatment, Values
from jaxtune.updates.treatments.table import TableTreatment

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Key, UInt32

ROWS_ALONE = "trainable_tokens_delta"
ROWS = f"token_adapter.{ROWS_ALONE}"
"""The ends of their name in an adapter that has nothing else, and in one of other modules."""


class TrainableTokensRule(RuleConfig):
    """Tokens whose embeddings are trained, in a table that stays as it is elsewhere."""

    method: Literal["trainable_tokens"] = Field(
        default="trainable_tokens", description="The embeddings of some tokens are trained, and no others."
    )
    tokens: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="Ids of the tokens, each once.")


class TrainableTokens(TableTreatment):
    """Rows of the embedding table, float32; a head that is tied to it has them too."""

    Section = TrainableTokensRule
    changes_parameters = True
    alone = "TRAINABLE_TOKENS"
    beside = "LORA"

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """The one of the table.

        Raises:
          UserError: the table has no such token, or one is twice.
        """
        for made in super().treat(arrays, sections, capacity):
            assert isinstance(made, TrainableTokens)
            if len(set(made.tokens)) < len(made.tokens):
                raise UserError(f"update.{made.used_rules[0]}.tokens: a token is twice")
            yield made

    @property
    def tokens(self) -> list[int]:
        """The ids, in the order of the rows."""
        return self.rule.tokens

    @property
    def module(self) -> str:
        """The table's."""
        return self.path.rpartition(".")[0]

    def arrays(self) -> Arrays:
        """Their embeddings."""
        return Shape((len(self.tokens), self.shape[1]), (None, self.axes[1]))

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """As the table has them."""
        del key, values
        return base[self.path][jnp.array(self.tokens)].astype(jnp.float32), {}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """The table with these rows in place."""
        del fixed, values, seed
        table = base[self.path]
        return Effect(
            {self.path: table.at[jnp.array(self.tokens)].set(arrays.astype(table.dtype), unique_indices=True)}
        )

    def sizes(self, values: Values) -> Iterator[Trained]:
        """Of the model's own parameters."""
        for each in super().sizes(values):
            yield dataclasses.replace(each, added=False)

    def settled(self, index: int) -> dict[str, Any]:
        """The tokens."""
        del index
        return {"tokens": " ".join(map(str, self.tokens))}

    def weight_share(self) -> dict[str, float]:
        """Of the whole table, which matters where the head is tied to it."""
        return {self.path: 1.0}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """The rows themselves, whatever PEFT's name for them says."""
        del fixed, values
        tensors = {ROWS: np.ascontiguousarray(arrays)}
        yield Exported(self.module, None, tensors, {"trainable_token_indices": tuple(self.tokens)})

    def tensors_alone(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """The same rows by another name."""
        for each in self.tensors(arrays, fixed, values):
            config = {"token_indices": tuple(self.tokens), "init_weights": True}
            yield dataclasses.replace(each, tensors={ROWS_ALONE: each.tensors[ROWS]}, config=config)

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """The tokens, of an adapter that has nothing else."""
        del module
        return {"tokens": config["token_indices"]}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """The rows."""
        held = tensors[0]
        return held[ROWS if ROWS in held else ROWS_ALONE].astype(np.float32), {}
