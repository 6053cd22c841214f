"""BAdam (arXiv:2404.02827): layers are trained one after another, each for some steps of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import PositiveInt
from jaxtune.late import np
from jaxtune.updates.treatments.base import Matched
from jaxtune.updates.treatments.selected import Choice, Period, Selected, checked_count, period_field


class BadamRule(RuleConfig):
    """Layers that are trained one after another (BAdam, arXiv:2404.02827)."""

    method: Literal["badam"] = Field(default="badam", description="These layers are trained one after another.")
    layers: PositiveInt = Field(default=1, description="How many layers are trained at a time.")
    period: Period = period_field(50)
    order: Literal["random", "ascending", "descending"] = Field(
        default="random", description="Which layers come next; random takes each once before one comes again."
    )


class Badam(Selected):
    """Of all stacks the same layers; every layer has its turn before one comes again.

    What has no layers is left alone, and the moments begin anew in each round, both as in the paper's code. Where the
    layers at a time do not divide those that there are, the last round also takes the first ones of the same order.
    """

    Section = BadamRule
    needs = "parameters of layers"
    forgets = True

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """Every parameter of a layer."""
        return array.layered

    @classmethod
    def count(cls, index: int, section: RuleConfig, layers: Sequence[int]) -> int:
        """As the key says."""
        assert isinstance(section, BadamRule)
        return checked_count(index, section.layers, layers)

    def chosen(self, choice: Choice, seed: int, number: int) -> Sequence[int]:
        """The next ones of the order; a random one is drawn for each time that all have their turn."""
        section, size = self.sections[choice.rule], len(choice.layers)
        assert isinstance(section, BadamRule)

        def turn(cycle: int) -> list[int]:
            if section.order == "random":
                return np.random.default_rng([seed, cycle]).permutation(size).tolist()
            return list(range(size))[:: 1 if section.order == "ascending" else -1]

        rounds = -(-size // choice.count)
        cycle, place = divmod(number, rounds)
        order = turn(cycle)
        return [choice.layers[order[(place * choice.count + at) % size]] for at in range(choice.count)]
