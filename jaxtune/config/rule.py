"""What every rule of ``update`` has. What a method adds stands with its code, in :mod:`jaxtune.updates.treatments`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from jaxtune.config.section import BesideAdapter, Later, Section, Traced


class RuleConfig(Section):
    """What every rule has: which parameters, and how fast they move."""

    match: str = Field(
        description="Path pattern: 'layers.*.attention.{q,v}', 'layers.{0..3}.**'; '*' is one part, '**' any number; "
        "'layers.{-3..-1}' are the last three layers."
    )
    learning_rate_scale: Annotated[float, Field(ge=0), Traced(), BesideAdapter()] = Field(
        default=1.0, description="Factor on optimizer.learning_rate for these parameters."
    )
    weight_decay: Annotated[Annotated[float, Field(ge=0), Traced()] | None, BesideAdapter()] = Field(
        default=None, description="Share, as optimizer.weight_decay, which holds if this is unset."
    )
    layer_decay: Annotated[Annotated[float, Field(gt=0, le=1), Traced()] | None, BesideAdapter(), Later(None)] = Field(
        default=None,
        description="Factor on the rate from each layer to the one below it; if unset, all layers have one rate.",
    )
    method: Any = Field(description="What becomes of these parameters: a file's name, or 'module:Name'.")

    @property
    def virtual_tokens(self) -> int:
        """So many positions in front of each document are the method's own, and hold no token of the document."""
        return 0
