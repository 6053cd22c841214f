"""``adamw8bit``: AdamW whose moments are kept as a byte each (arXiv:2110.02861)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jaxtune.config.optimizer_section import ClipNorm, Epsilon, Kind, OptimizerSection
from jaxtune.config.section import PositiveInt, Probability, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class AdamW8bitConfig(OptimizerSection):
    """AdamW with both means in 8 bits (arXiv:2110.02861), by blocks that have a largest value each."""

    kind: Kind = Field(
        default="adamw8bit",
        description="AdamW in 8 bits (arXiv:2110.02861): 2 bytes of state for each parameter of a matrix and 8 for "
        "each block; 8 for each parameter of what is no matrix.",
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
    block: PositiveInt = Field(
        default=256,
        description="Numbers of a block, along a matrix's last side, or its longer one where that is shorter.",
    )
    smallest: PositiveInt = Field(
        default=4096, description="Size of a matrix, in numbers, below which its means stay in 32 bits."
    )
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """Bytes for matrices, AdamW as it is for vectors and small matrices."""
        import math

        from jaxtune.training.optimizers.adamw8bit.quantized import Quantized
        from jaxtune.training.per_tensor import Adam, PerTensor, TensorRule

        bytewise, exact = Quantized(self.block), Adam()

        def choose(shape: tuple[int, ...], stacked: bool) -> TensorRule:
            return bytewise if len(shape) == 2 and math.prod(shape) >= self.smallest else exact

        return PerTensor(plan, choose)
