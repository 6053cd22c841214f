"""``optax``: any optimizer of optax by its name, under this project's rate, schedule, clipping, decay and rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from jaxtune.config.optimizer_section import ClipNorm, Kind, OptimizerSection
from jaxtune.config.section import Traced
from jaxtune.training.optimizers import Optimizer

if TYPE_CHECKING:
    import jaxtune.updates


class OptaxConfig(OptimizerSection):
    """An optimizer of optax by its name; rate, schedule, clipping, decay and the rules' factors are those of here."""

    kind: Kind = Field(
        default="optax", description="An optimizer of optax or optax.contrib: its name stands at optimizer.name."
    )
    name: str = Field(
        description="Function of optax or optax.contrib that makes it: 'nadamw', 'lamb', 'adan', 'scale_by_adam'."
    )
    numbers: Annotated[dict[str, float], Traced()] = Field(
        default_factory=dict,
        description="Its numbers that can change without a new compilation, by optax's names: {b1: 0.9}. Optax's own "
        "if unset; the rate and the decay are never among them.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Its other arguments, which steps are compiled for: {nesterov: true}. Optax's own if unset.",
    )
    clip_norm: ClipNorm = 1.0

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> Optimizer:
        """The transformation over the trained layers.

        Raises:
          UserError: optax has no such function, it makes no transformation, or it has no such argument.
        """
        from jaxtune.training.named_transformation import NamedTransformation

        return NamedTransformation(plan, self.name, self.numbers, self.options)
