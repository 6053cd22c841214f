"""Parameters that do not change, so that a later rule may name more than it takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.updates.treatments.base import Matched, Treatment


class FrozenRule(RuleConfig):
    """Parameters that do not change."""

    method: Literal["frozen"] = Field(default="frozen", description="These parameters do not change.")


class Frozen(Treatment):
    """Nothing at all."""

    Section = FrozenRule
    needs = "parameters"
    trains = False

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """Everything can be left as it is."""
        del array
        return True
