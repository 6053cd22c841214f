"""The ``update`` section: rules that say what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from jaxtune.config.section import (
    BesideAdapter,
    PositiveInt,
    Probability,
    Section,
    Traced,
)


class RuleConfig(Section):
    """What every rule has: which parameters, and how fast they move."""

    match: str = Field(
        description="Path pattern: 'layers.*.attention.{q,v}', 'layers.{0..3}.**'; '*' is one part, '**' any number."
    )
    learning_rate_scale: Annotated[float, Field(ge=0), Traced(), BesideAdapter()] = Field(
        default=1.0, description="Factor on optimizer.learning_rate for these parameters."
    )
    weight_decay: Annotated[Annotated[float, Field(ge=0), Traced()] | None, BesideAdapter()] = Field(
        default=None, description="Share, as optimizer.weight_decay, which holds if this is unset."
    )


class FrozenRule(RuleConfig):
    """Parameters that do not change."""

    method: Literal["frozen"] = Field(default="frozen", description="These parameters do not change.")


class FullRule(RuleConfig):
    """Parameters that are trained themselves."""

    method: Literal["full"] = Field(default="full", description="These parameters are trained themselves.")


class LowRankRule(RuleConfig):
    """Linear layers that get a trained low-rank term (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732)."""

    method: Literal["low_rank"] = Field(
        default="low_rank", description="These linear layers get a trained low-rank term."
    )
    rank: Annotated[PositiveInt, Traced(capacity=True)] = Field(
        default=16, description="Rank of the term: columns of A and rows of B."
    )
    alpha: Annotated[float, Field(gt=0), Traced()] = Field(
        default=32.0, description="The term is scaled by alpha / rank, or as use_rslora says."
    )
    dropout: Annotated[Probability, Traced(), BesideAdapter()] = Field(
        default=0.0, description="Share of the term's inputs that are left out of a training step."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")


Rule = Annotated[FrozenRule | FullRule | LowRankRule, Field(discriminator="method")]


REFERENCE_UPDATE = (LowRankRule(match="layers.*.attention.{q,v}", rank=16, alpha=32.0, dropout=0.1),)
