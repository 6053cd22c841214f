"""``lion``: the sign of one mean of gradients moves (arXiv:2302.06675), over the masked update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jaxtune.config.optimizer_section import ClipNorm, Kind, OptimizerSection
from jaxtune.config.section import Probability, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class LionConfig(OptimizerSection):
    """Lion (arXiv:2302.06675): each parameter moves by the rate; a third to a tenth of AdamW's is usual."""

    kind: Kind = Field(
        default="lion", description="Lion (arXiv:2302.06675): 4 bytes of state for each trained parameter."
    )
    beta1: Annotated[Probability, Traced()] = Field(
        default=0.9, description="Share of the mean of gradients, beside the new one, in what gives a step its sign."
    )
    beta2: Annotated[Probability, Traced()] = Field(
        default=0.99, description="Share of the mean of gradients that a step keeps."
    )
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """Lion whose mean belongs to trained layers alone."""
        from jaxtune.training.masked_optimizer import MaskedOptimizer

        return MaskedOptimizer(plan, kernels, "lion", (("b1", "beta1"), ("b2", "beta2")))
