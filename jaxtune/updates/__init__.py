"""What training changes: rules, the low-rank and full treatments, PEFT adapters."""

from jaxtune.updates.low_rank import Hyperparameters
from jaxtune.updates.plan import ResolvedPlan, Trainable, UpdatePlan

__all__ = ["Hyperparameters", "ResolvedPlan", "Trainable", "UpdatePlan"]
