"""``adafactor``: squared gradients kept as a mean by row and by column (arXiv:1804.04235), of optax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.config.optimizer_section import ClipNorm, Epsilon, Kind, OptimizerSection
from jaxtune.config.section import PositiveInt, Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class AdafactorConfig(OptimizerSection):
    """Adafactor (arXiv:1804.04235) with the rate given, each layer of a stack a matrix of its own."""

    kind: Kind = Field(
        default="adafactor",
        description="Adafactor (arXiv:1804.04235): of a large matrix 4 bytes of state for each row and column.",
    )
    decay_rate: Annotated[float, Field(gt=0), Traced()] = Field(
        default=0.8, description="The mean of squared gradients keeps a share of 1 - t^-decay_rate at step t."
    )
    clip_rms: Annotated[float, Field(gt=0), Traced()] = Field(
        default=1.0, description="Largest root of the mean of squares of a tensor's step, before the rate."
    )
    factor_from: PositiveInt = Field(
        default=128, description="Size of a matrix's smaller side from which on rows and columns stand for it."
    )
    scale_by_parameter: bool = Field(
        default=False,
        description="Multiply a step by the root of the mean of squares of the tensor, 0.001 at least.",
    )
    epsilon: Epsilon = Field(default=1e-30, description="Added to squared gradients, whose mean a step divides by.")
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """optax's factored scaling and clipping, tensor by tensor."""
        import optax

        from jaxtune.training.per_tensor import Numbers, OfOptax, PerTensor

        def make(numbers: Numbers) -> optax.GradientTransformation:
            parts = [
                optax.scale_by_factored_rms(
                    decay_rate=numbers["decay_rate"],
                    min_dim_size_to_factor=self.factor_from,
                    epsilon=numbers["epsilon"],
                ),
                optax.clip_by_block_rms(numbers["clip_rms"]),
            ]
            if self.scale_by_parameter:
                parts.append(optax.scale_by_param_block_rms())
            return optax.chain(*parts)

        rule = OfOptax(make, hyperparameters(self))
        return PerTensor(plan, lambda shape, stacked: rule)
