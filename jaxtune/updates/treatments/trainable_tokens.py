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


@dataclasses.dataclass(frozen=True, eq=False)
class TrainableTokens(Treatment):
    """Rows of the embedding table, float32; a head that is tied to it has them too.

    Attributes:
      shape: of the table.
      axes: its logical axes.
    """

    Section = TrainableTokensRule
    needs = "the embedding table"
    changes_parameters = True
    alone = "TRAINABLE_TOKENS"
    beside = "LORA"

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """The table alone."""
        return array.path == "embed.table"

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """The one of the table."""
        del capacity
        for array in arrays:
            (index,) = array.rules
            made = cls(array.path, array.rules, {index: sections[index]}, array.shape, array.axes)
            wrong = [token for token in made.tokens if token >= array.shape[0]]
            if wrong or len(set(made.tokens)) < len(made.tokens):
                said = (
                    f"the model has the tokens 0 to {array.shape[0] - 1}, not {wrong}" if wrong else "a token is twice"
                )
                raise UserError(f"update.{index}.tokens: {said}")
            yield made

    @property
    def tokens(self) -> list[int]:
        """The ids, in the order of the rows."""
        (section,) = self.sections.values()
        rule: Any = section
        return rule.tokens

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
