"""``adamw``: AdamW (arXiv:1711.05101), over the masked update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jaxtune.config.optimizer_section import ClipNorm, Epsilon, Kind, OptimizerSection
from jaxtune.config.section import Probability, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class OptimizerConfig(OptimizerSection):
    """AdamW and its schedule. The defaults are the paper's reference configuration (arXiv:2407.13906)."""

    kind: Kind = Field(
        default="adamw", description="AdamW (arXiv:1711.05101): 8 bytes of state for each trained parameter."
    )
    beta1: Annotated[Probability, Traced()] = Field(
        default=0.9, description="Share of the mean of gradients that a step keeps."
    )
    beta2: Annotated[Probability, Traced()] = Field(
        default=0.999, description="Share of the mean of squared gradients that a step keeps."
    )
    epsilon: Epsilon = Field(
        default=1e-8, description="Added to the root of the mean of squared gradients, by which a step divides."
    )
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """AdamW whose moments belong to trained layers alone."""
        from jaxtune.training.masked_optimizer import MaskedOptimizer

        return MaskedOptimizer(plan, kernels)
