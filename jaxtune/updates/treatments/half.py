"""Half fine-tuning (arXiv:2404.18466): of each category of matrices half is trained, and the other half stays."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.errors import UserError
from jaxtune.late import TYPES, np
from jaxtune.updates.treatments.selected import Choice, Period, Selected, period_field

if TYPE_CHECKING or TYPES:
    from jaxtyping import Bool


class HalfRule(RuleConfig):
    """Parameters of which a share of the layers is trained, drawn for each matrix (HFT, arXiv:2404.18466)."""

    method: Literal["half"] = Field(
        default="half", description="A share of these parameters is trained, and the rest stays as it is."
    )
    share: Annotated[float, Field(ge=0.1, le=0.9)] = Field(
        default=0.5, description="Share of the layers of each matrix that are trained, 0.1 to 0.9."
    )
    period: Period | None = period_field(None, " If unset, those of the start are trained to the end.")


class Half(Selected):
    """Of every stack as many layers, drawn for the matrices of a category together.

    The categories are attention, MLP and norms; a bias goes with its matrix. Of a category each layer trains as many
    matrices as any other, but for one: of q, k, v and o two, of gate, up and down two in half of the layers and one in
    the others. What has no layers (embeddings, head, last norm) is trained at all times. Moments stay with what stays.
    """

    Section = HalfRule
    needs = "parameters"

    @classmethod
    def kind(cls, module: str) -> str:
        """The category."""
        return "norms" if module.endswith("norm") else module.split(".")[1]

    @classmethod
    def count(cls, index: int, section: RuleConfig, layers: Sequence[int]) -> int:
        """The share of the layers, to the nearest number."""
        assert isinstance(section, HalfRule)
        count = math.floor(section.share * len(layers) + 0.5)
        if not count:
            raise UserError(
                f"update.{index}.share: {section.share:g} of {len(layers)} layers selects nothing; give at least "
                f"{math.ceil(50 / len(layers)) / 100:g}"
            )
        return count

    def chosen(self, choice: Choice, seed: int, number: int) -> Sequence[int]:
        """By one draw for the whole category."""
        what = f"{self.kind(choice.column)} {choice.layers} {choice.count} {choice.columns}"
        generator = np.random.default_rng([seed, number, zlib.crc32(what.encode())])
        drawn = balanced(generator, len(choice.layers), len(choice.columns), choice.count)
        return np.array(choice.layers)[drawn[:, choice.columns.index(choice.column)]].tolist()


def balanced(generator: Any, rows: int, columns: int, count: int) -> Bool[np.ndarray, "rows columns"]:
    """A random matrix of zeros and ones: ``count`` ones in each column, and in each row as many as in any, but for one.

    Ones are dealt out in turns over rows in random order. Then squares whose corners alternate are turned over, which
    changes no sum: 20 tries for each entry.

    Args:
      generator: of NumPy.
      rows: how many.
      columns: how many.
      count: of ones in a column, at most as many as rows.
    """
    order, drawn = generator.permutation(rows), np.zeros((rows, columns), bool)
    for column in range(columns):
        drawn[order[(column * count + np.arange(count)) % rows], column] = True
    if min(rows, columns) < 2:
        return drawn
    tries = 20 * rows * columns
    ends = [generator.integers(0, size - place, tries) for size in (rows, columns) for place in (0, 1)]
    for i, j, a, b in zip(*(each.tolist() for each in ends), strict=True):
        j, b = j + (j >= i), b + (b >= a)
        if drawn[i, a] != drawn[j, a] and drawn[i, a] != drawn[i, b] and drawn[i, a] == drawn[j, b]:
            for row, column in ((i, a), (i, b), (j, a), (j, b)):
                drawn[row, column] = not drawn[row, column]
    return drawn
