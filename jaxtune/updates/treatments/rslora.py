"""rsLoRA (arXiv:2312.03732): LoRA whose term is scaled by the root of the rank, so that large ranks learn as fast."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxtune.updates.treatments.low_rank import LowRank, RankRule


class RsLoraRule(RankRule):
    """Linear layers that get a low-rank term scaled by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""

    method: Literal["rslora"] = Field(
        default="rslora", description="These linear layers get a low-rank term scaled by alpha / sqrt(rank)."
    )

    @property
    def rooted(self) -> bool:
        """Always."""
        return True


class RsLora(LowRank):
    """``y = x W + alpha / sqrt(rank) · x A B + bias``."""

    Section = RsLoraRule
