"""LISA (arXiv:2403.17919): a few random layers are trained at a time, beside embeddings and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import PositiveInt
from jaxtune.late import np
from jaxtune.updates.treatments.selected import Choice, Period, Selected, checked_count, period_field


class LisaRule(RuleConfig):
    """Parameters of which a few random layers are trained at a time (LISA, arXiv:2403.17919)."""

    method: Literal["lisa"] = Field(
        default="lisa", description="A few random layers of these parameters are trained at a time."
    )
    layers: PositiveInt = Field(default=2, description="How many layers are trained at a time.")
    period: Period = period_field(20)


class Lisa(Selected):
    """Of all stacks the same layers, drawn in every round without regard to earlier ones.

    What has no layers (embeddings, head, last norm) is trained at all times. The moments of a layer begin anew in each
    round, those of the rest go on, as in the paper's code.
    """

    Section = LisaRule
    needs = "parameters"
    forgets = True

    @classmethod
    def count(cls, index: int, section: RuleConfig, layers: Sequence[int]) -> int:
        """As the key says."""
        assert isinstance(section, LisaRule)
        return checked_count(index, section.layers, layers)

    def chosen(self, choice: Choice, seed: int, number: int) -> Sequence[int]:
        """By one draw for all modules."""
        generator = np.random.default_rng([seed, number])
        return np.array(choice.layers)[generator.permutation(len(choice.layers))[: choice.count]].tolist()
