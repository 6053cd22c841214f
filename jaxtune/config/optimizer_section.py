"""The ``optimizer`` section: what all optimizers have, and how one is found by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxtune.config.kinds import Kinds
from jaxtune.config.section import Later, Probability, Section, Traced, located

if TYPE_CHECKING:
    import jaxtune.training.optimizers
    import jaxtune.updates

ClipNorm = Annotated[float, Field(gt=0, description="Largest global gradient norm."), Traced()]
Kind = Annotated[str, Later("adamw")]
Epsilon = Annotated[float, Field(gt=0), Traced()]


class OptimizerSection(Section):
    """What every optimizer has: its name, a learning rate with its schedule, and weight decay.

    A section for an optimizer derives from it, adds the optimizer's own numbers, those marked ``Traced`` being
    arguments of the compiled step, and says in :meth:`build` what moves the parameters. One of another package leaves
    ``kind`` as it is here.
    """

    kind: Kind = Field(
        default="adamw",
        description="Name of the optimizer: one of this page, or of an installed package's, or module:Name of one.",
    )
    learning_rate: Annotated[float, Field(gt=0), Traced()] = Field(
        default=1e-4, description="Learning rate at its peak, after the warm-up."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up, down to final_scale."
    )
    warmup: Annotated[Probability, Traced()] = Field(default=0.1, description="Share of all steps spent warming up.")
    final_scale: Annotated[float, Field(ge=0, le=1), Traced()] = Field(
        default=0.0, description="Learning rate at the end, as a share of the peak (cosine and linear)."
    )
    weight_decay: Annotated[float, Field(ge=0), Traced()] = Field(
        default=0.0,
        description="Share of a parameter, times the learning rate, that a step takes off it (AdamW).",
    )

    @model_validator(mode="after")
    def _own_kind(self) -> OptimizerSection:
        own = type(self).model_fields["kind"].default
        if self.kind != own and OPTIMIZERS.builtin.get(own) is type(self):
            raise located(("kind",), self.kind, f"{type(self).__name__} is the section of {own}")
        return self

    @classmethod
    def choices(cls) -> list[type[Section]]:
        """All optimizers of the package, in place of what they have in common."""
        return list(OPTIMIZERS.builtin.values()) if cls is OptimizerSection else [cls]

    def build(self, plan: jaxtune.updates.ResolvedPlan, kernels: str) -> jaxtune.training.optimizers.Optimizer:
        """The optimizer for what a plan trains.

        Args:
          plan: what is trained, by which rules.
          kernels: what computes the update, one of :data:`jaxtune.models.linear.KERNELS`.

        Raises:
          UserError: the section names something that there is not.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build(plan, kernels)")


OPTIMIZERS = Kinds(
    what="optimizer",
    package="jaxtune.training.optimizers",
    group="jaxtune.optimizers",
    base=lambda: OptimizerSection,
    default="adamw",
)
"""What ``optimizer.kind`` can name."""


def default_optimizer(**values: Any) -> Any:
    """The default optimizer's section; its numbers are the paper's reference configuration (arXiv:2407.13906)."""
    return OPTIMIZERS.parse(values)
