"""What training changes: rules, the low-rank and full treatments, PEFT adapters."""

from jaxtune.updates.low_rank import Hyperparameters
from jaxtune.updates.merging import merge_adapters
from jaxtune.updates.peft_export import save_adapter
from jaxtune.updates.peft_import import load_adapter
from jaxtune.updates.plan import ResolvedPlan, Trainable, UpdatePlan

__all__ = [
    "Hyperparameters",
    "ResolvedPlan",
    "Trainable",
    "UpdatePlan",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
]
