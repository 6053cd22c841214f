"""The trainer: the pure step, the loop around it, checkpoints, and one run from configuration to summary.

The names are imported when they are first used: optimizers are sections of the configuration as well, which is read
without jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.training.run import Diverged, train
    from jaxtune.training.state import TrainState
    from jaxtune.training.summary import RunSummary
    from jaxtune.training.trainer import Trainer

_HOMES = {
    "Diverged": "run",
    "RunSummary": "summary",
    "TrainState": "state",
    "Trainer": "trainer",
    "train": "run",
}

__all__ = ["Diverged", "RunSummary", "TrainState", "Trainer", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
