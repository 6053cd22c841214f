"""BitFit (arXiv:2106.10199): the biases of a model that has some, and nothing else."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.updates.treatments.base import Matched
from jaxtune.updates.treatments.full import Full


class BitFitRule(RuleConfig):
    """Biases that are trained themselves, of whatever the pattern matches (BitFit, arXiv:2106.10199)."""

    method: Literal["bitfit"] = Field(default="bitfit", description="The biases among these parameters are trained.")


class BitFit(Full):
    """Biases."""

    Section = BitFitRule
    needs = "layers with biases"

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """Biases alone."""
        return array.path.endswith(".bias")
