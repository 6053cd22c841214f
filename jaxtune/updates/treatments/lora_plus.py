"""LoRA+ (arXiv:2402.12354): LoRA whose B moves faster than its A, as wide models need it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jaxtune.config.section import BesideAdapter, Traced
from jaxtune.updates.treatments.base import Arrays
from jaxtune.updates.treatments.low_rank import LowRank, RankRule


class LoraPlusRule(RankRule):
    """Linear layers that get a low-rank term whose B has a larger learning rate (LoRA+, arXiv:2402.12354)."""

    method: Literal["lora_plus"] = Field(
        default="lora_plus", description="These linear layers get a low-rank term whose B has a larger learning rate."
    )
    ratio: Annotated[float, Field(gt=0), Traced(), BesideAdapter()] = Field(
        default=16.0, description="Factor on the learning rate of B; that of A is the rule's own."
    )


class LoraPlus(LowRank):
    """LoRA but for the rates."""

    Section = LoraPlusRule

    def groups(self) -> Arrays:
        """B at ``ratio`` times the rate."""
        groups = super().groups()
        return {**groups, "b": dataclasses.replace(groups["b"], factors=("ratio",))}
