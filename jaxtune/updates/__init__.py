"""What training changes: rules, the treatments of update methods, PEFT adapters.

Sections of the configuration stand in here, so that nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.updates.combine import combine_adapters
    from jaxtune.updates.merging import merge_adapters
    from jaxtune.updates.peft.export import save_adapter
    from jaxtune.updates.peft.load import load_adapter, load_adapters
    from jaxtune.updates.plan import UpdatePlan
    from jaxtune.updates.resolved import ResolvedPlan, Trainable
    from jaxtune.updates.treatments.base import Values

_HOMES = {
    "ResolvedPlan": "resolved",
    "Trainable": "resolved",
    "UpdatePlan": "plan",
    "Values": "treatments.base",
    "combine_adapters": "combine",
    "load_adapter": "peft.load",
    "load_adapters": "peft.load",
    "merge_adapters": "merging",
    "save_adapter": "peft.export",
}

__all__ = [
    "ResolvedPlan",
    "Trainable",
    "UpdatePlan",
    "Values",
    "combine_adapters",
    "load_adapter",
    "load_adapters",
    "merge_adapters",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
