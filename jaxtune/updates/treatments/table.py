"""What methods for the embedding table have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from jaxtune.config.rule import RuleConfig
from jaxtune.errors import UserError
from jaxtune.updates.treatments.base import Matched, Treatment

TABLE = "embed.table"


@dataclasses.dataclass(frozen=True, eq=False)
class TableTreatment(Treatment):
    """A method for the embedding table, whose rule may name ``tokens`` of it.

    Attributes:
      shape: of the table.
      axes: its logical axes.
    """

    needs = "the embedding table"
    place: ClassVar[str] = TABLE
    """Its ``path``: that of the table, or of the module."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """The table alone."""
        return array.path == TABLE

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """The one of the table.

        Raises:
          UserError: the table has no such token.
        """
        del capacity
        for array in arrays:
            (index,) = array.rules
            made = cls(cls.place, array.rules, {index: sections[index]}, array.shape, array.axes)
            if wrong := [token for token in made.rule.tokens or () if token >= array.shape[0]]:
                raise UserError(
                    f"update.{index}.tokens: the model has the tokens 0 to {array.shape[0] - 1}, not {wrong}"
                )
            yield made

    @property
    def rule(self) -> Any:
        """Its one rule."""
        (section,) = self.sections.values()
        return section
