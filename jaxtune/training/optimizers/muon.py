"""``muon``: momentum made orthogonal for matrices of the layers, of optax; AdamW for all else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.config.optimizer_section import ClipNorm, Epsilon, Kind, OptimizerSection
from jaxtune.config.section import PositiveInt, Probability, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class MuonConfig(OptimizerSection):
    """Muon (arXiv:2502.16982) for the layers' matrices; AdamW for embeddings, head, norms and biases."""

    kind: Kind = Field(
        default="muon",
        description="Muon (arXiv:2502.16982): 4 bytes of state for each parameter of a layer's matrix, 8 for others.",
    )
    momentum: Annotated[Probability, Traced()] = Field(
        default=0.95, description="Share of the mean of a matrix's gradients that a step keeps."
    )
    nesterov: bool = Field(default=True, description="Look a step ahead with the mean of gradients.")
    newton_schulz: PositiveInt = Field(
        default=5, description="Steps of the Newton-Schulz iteration that bring the singular values of a step near 1."
    )
    rms: Annotated[float, Field(gt=0), Traced()] = Field(
        default=0.2,
        description="Size of a matrix's step, before the rate: the root of its mean square; 0.2 is near AdamW's, whose "
        "rates then fit.",
    )
    beta1: Annotated[Probability, Traced()] = Field(
        default=0.9, description="Share of the mean of gradients that a step keeps, where AdamW moves."
    )
    beta2: Annotated[Probability, Traced()] = Field(
        default=0.999, description="Share of the mean of squared gradients that a step keeps, where AdamW moves."
    )
    epsilon: Epsilon = Field(default=1e-8, description="Added to the norms and roots that a step divides by.")
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """optax's orthogonal momentum, layer by layer, and AdamW where there is no matrix of a layer."""
        import optax

        from jaxtune.training.per_tensor import Adam, Numbers, OfOptax, PerTensor, TensorRule

        def make(numbers: Numbers) -> optax.GradientTransformation:
            orthogonal = optax.contrib.scale_by_muon(
                ns_steps=self.newton_schulz,
                beta=numbers["momentum"],
                eps=numbers["epsilon"],
                nesterov=self.nesterov,
                weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(),
            )

            # An orthogonal matrix of m x n has a mean square of 1 / max(m, n).
            def sized(step: Any, _: Any) -> Any:
                return step * numbers["rms"] * max(step.shape) ** 0.5

            return optax.chain(orthogonal, optax.stateless(sized))

        orthogonal, other = OfOptax(make, hyperparameters(self)), Adam()

        def choose(shape: tuple[int, ...], stacked: bool) -> TensorRule:
            return orthogonal if stacked and len(shape) == 2 else other

        return PerTensor(plan, choose)
