"""``sgd``: gradient descent with momentum, over the masked update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jaxtune.config.optimizer_section import ClipNorm, Kind, OptimizerSection
from jaxtune.config.section import Probability, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class SgdConfig(OptimizerSection):
    """Gradient descent with momentum (Polyak's heavy ball, as torch writes it); its rates are far above AdamW's."""

    kind: Kind = Field(
        default="sgd", description="Gradient descent with momentum: 4 bytes of state for each trained parameter."
    )
    momentum: Annotated[Probability, Traced()] = Field(
        default=0.9, description="Share of the last step that is made again; 0 is plain gradient descent."
    )
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """Momentum that belongs to trained layers alone."""
        from jaxtune.training.masked_optimizer import MaskedOptimizer

        return MaskedOptimizer(plan, kernels, "sgd", (("b1", "momentum"),))
