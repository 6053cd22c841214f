"""Objectives: from a model and a batch to losses, their weights, and metrics.

An objective is any function ``(model, batch, hyperparameters) -> Terms``. The step minimises
``sum(losses × weights) / sum(weights)``, both sums taken over the whole global batch, so that accumulation, packing and
data parallelism give the number that one big batch gives; metrics likewise.
"""

from jaxtune.evaluation.terms import Terms
from jaxtune.training.objectives.base import Batch, Forward, Hyperparameters, Objective
from jaxtune.training.objectives.calling import call
from jaxtune.training.objectives.cross_entropy import cross_entropy

__all__ = ["Batch", "Forward", "Hyperparameters", "Objective", "Terms", "call", "cross_entropy"]
