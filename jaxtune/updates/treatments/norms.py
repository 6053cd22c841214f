"""The scales of a model's norms, and nothing else (arXiv:2312.11420): the fewest numbers that reach every layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.updates.treatments.base import Matched
from jaxtune.updates.treatments.full import Full


class NormsRule(RuleConfig):
    """Norms whose scales are trained, of whatever the pattern matches (arXiv:2312.11420)."""

    method: Literal["norms"] = Field(
        default="norms", description="The scales of the norms among these parameters are trained."
    )


class Norms(Full):
    """Scales of norms."""

    Section = NormsRule
    needs = "norms"

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """Scales of norms alone."""
        return array.path.endswith("norm.scale")
