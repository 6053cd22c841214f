"""jaxtune: which fine-tuning configuration is worth finishing, and the trainer to find out.

The public names; each is imported when it is first used, so that ``jaxtune --help`` answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("torch") is None:
    # transformers misses it aloud when it is imported, and its tokenizers and configurations do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# What transformers imports misses ipywidgets aloud in a notebook; bars of downloads are text without them.
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    from jaxtune.config import Config, load_config
    from jaxtune.config.data_section import DataConfig, SourceConfig
    from jaxtune.config.training_sections import TrainConfig
    from jaxtune.data import evaluation_batches, make_examples, open_source, train_batches
    from jaxtune.errors import UserError
    from jaxtune.evaluation import LossResult, generate
    from jaxtune.models import AdapterSet, Decoder, DecoderConfig, load_model, load_tokenizer, save_model
    from jaxtune.parallel import make_mesh
    from jaxtune.search import Study, trials
    from jaxtune.telemetry.progress import ProgressDisplay
    from jaxtune.telemetry.writers import JsonlWriter
    from jaxtune.training import Trainer, TrainState, train
    from jaxtune.training.checkpoints import Checkpoints, load_checkpoint
    from jaxtune.training.fit import FitResult
    from jaxtune.training.objectives import Batch, Forward, Hyperparameters, Terms
    from jaxtune.training.optimizers.adamw import OptimizerConfig
    from jaxtune.updates import (
        UpdatePlan,
        combine_adapters,
        load_adapter,
        load_adapters,
        merge_adapters,
        save_adapter,
    )
    from jaxtune.updates.treatments.frozen import FrozenRule
    from jaxtune.updates.treatments.full import FullRule
    from jaxtune.updates.treatments.low_rank import LowRankRule

    __version__: str


def _refuse_other_systems() -> None:
    """Says at once where jaxtune runs, instead of failing later at the first lock, which Windows has no call for."""
    try:
        importlib.import_module("fcntl")
    except ImportError:
        pass
    else:
        return
    message = "jaxtune runs on Linux and macOS; on Windows, install it inside WSL (wsl --install) and run it there"
    # The command is told in one line; whoever imports the package gets an error to catch.
    program = PureWindowsPath(sys.argv[0]).stem if sys.argv else ""
    if program in ("jaxtune", "-m"):
        raise SystemExit(f"jaxtune: {message}")
    raise ImportError(message)


_refuse_other_systems()

_HOMES = {
    "Config": "config",
    "load_config": "config",
    "DataConfig": "config.data_section",
    "FrozenRule": "updates.treatments.frozen",
    "FullRule": "updates.treatments.full",
    "LowRankRule": "updates.treatments.low_rank",
    "OptimizerConfig": "training.optimizers.adamw",
    "SourceConfig": "config.data_section",
    "TrainConfig": "config.training_sections",
    "evaluation_batches": "data",
    "make_examples": "data",
    "open_source": "data",
    "train_batches": "data",
    "UserError": "errors",
    "LossResult": "evaluation",
    "generate": "evaluation",
    "AdapterSet": "models",
    "Decoder": "models",
    "DecoderConfig": "models",
    "load_model": "models",
    "load_tokenizer": "models",
    "save_model": "models",
    "make_mesh": "parallel",
    "Study": "search",
    "trials": "search",
    "ProgressDisplay": "telemetry.progress",
    "JsonlWriter": "telemetry.writers",
    "Trainer": "training",
    "TrainState": "training",
    "Batch": "training.objectives",
    "Forward": "training.objectives",
    "Hyperparameters": "training.objectives",
    "Terms": "training.objectives",
    "train": "training",
    "Checkpoints": "training.checkpoints",
    "load_checkpoint": "training.checkpoints",
    "FitResult": "training.fit",
    "UpdatePlan": "updates",
    "combine_adapters": "updates",
    "load_adapter": "updates",
    "load_adapters": "updates",
    "merge_adapters": "updates",
    "save_adapter": "updates",
}

__all__ = [
    "AdapterSet",
    "Batch",
    "Checkpoints",
    "Config",
    "DataConfig",
    "Decoder",
    "DecoderConfig",
    "FitResult",
    "Forward",
    "FrozenRule",
    "FullRule",
    "Hyperparameters",
    "JsonlWriter",
    "LossResult",
    "LowRankRule",
    "OptimizerConfig",
    "ProgressDisplay",
    "SourceConfig",
    "Study",
    "Terms",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "UpdatePlan",
    "UserError",
    "__version__",
    "combine_adapters",
    "evaluation_batches",
    "generate",
    "load_adapter",
    "load_adapters",
    "load_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_examples",
    "make_mesh",
    "merge_adapters",
    "open_source",
    "save_adapter",
    "save_model",
    "train",
    "train_batches",
    "trials",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jaxtune")
    if name not in _HOMES:
        if not name.startswith("_") and importlib.util.find_spec(f"jaxtune.{name}") is not None:
            return importlib.import_module(f"jaxtune.{name}")  # jaxtune.search.search, with no other import
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxtune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
