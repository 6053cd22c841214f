"""The trainer: the pure step, the loop around it, checkpoints, and one run from configuration to summary."""

from jaxtune.training.run import Diverged, train
from jaxtune.training.state import TrainState
from jaxtune.training.summary import RunSummary
from jaxtune.training.trainer import Trainer

__all__ = ["Diverged", "RunSummary", "TrainState", "Trainer", "train"]
