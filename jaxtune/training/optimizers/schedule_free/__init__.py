"""``schedule_free``: AdamW without a schedule, evaluated at a mean of its path (arXiv:2405.15682)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from jaxtune.config.optimizer_section import ClipNorm, Epsilon, Kind, OptimizerSection
from jaxtune.config.section import Probability, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class ScheduleFreeConfig(OptimizerSection):
    """Schedule-free AdamW (arXiv:2405.15682): what is evaluated and saved is the mean of the path so far."""

    kind: Kind = Field(
        default="schedule_free",
        description="Schedule-free AdamW (arXiv:2405.15682): 8 bytes of state for each trained parameter.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="constant", description="How the learning rate falls after the warm-up; not at all is what it is for."
    )
    beta1: Annotated[float, Field(gt=0, lt=1), Traced()] = Field(
        default=0.9, description="Share of the mean of the path in the point where a gradient is taken."
    )
    beta2: Annotated[Probability, Traced()] = Field(
        default=0.999, description="Share of the mean of squared gradients that a step keeps."
    )
    epsilon: Epsilon = Field(
        default=1e-8, description="Added to the root of the mean of squared gradients, by which a step divides."
    )
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """The same rule for every tensor."""
        from jaxtune.training.optimizers.schedule_free.averaged import Averaged
        from jaxtune.training.per_tensor import PerTensor

        rule = Averaged()
        return PerTensor(plan, lambda shape, stacked: rule)
