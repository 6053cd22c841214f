"""``galore``: Adam in a subspace of each matrix's gradient, which moves at intervals (arXiv:2403.03507)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jaxtune.config.optimizer_section import ClipNorm, Epsilon, Kind, OptimizerSection
from jaxtune.config.section import PositiveInt, Probability, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class GaloreConfig(OptimizerSection):
    """GaLore (arXiv:2403.03507) for the layers' matrices; AdamW for what is smaller than its rank, and all else."""

    kind: Kind = Field(
        default="galore",
        description="GaLore (arXiv:2403.03507): of a matrix m x n, m <= n, 4 rank (m + 2 n) bytes of state.",
    )
    rank: PositiveInt = Field(
        default=128,
        description="Size of the subspace: so many singular directions of a gradient's shorter side. Matrices whose "
        "shorter side is no larger have AdamW.",
    )
    period: Annotated[PositiveInt, Traced()] = Field(
        default=200, description="Steps between two choices of the subspace; Adam's means stay as they are."
    )
    scale: Annotated[float, Field(gt=0), Traced()] = Field(
        default=0.25, description="Factor on the rate where a step comes from a subspace."
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
        """A projector for each layer of a stack of matrices."""
        from jaxtune.training.optimizers.galore.projected import Projected
        from jaxtune.training.per_tensor import Adam, PerTensor, TensorRule

        projected, whole = Projected(self.rank), Adam()

        def choose(shape: tuple[int, ...], stacked: bool) -> TensorRule:
            return projected if stacked and len(shape) == 2 and min(shape) > self.rank else whole

        return PerTensor(plan, choose)
