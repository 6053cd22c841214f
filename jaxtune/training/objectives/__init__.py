"""Objectives: from a model and a batch to losses and their weights.

An objective is any function ``(model, batch, hyperparameters) -> (losses, weights)``: two float32 arrays of one shape.
The step minimises ``sum(losses × weights) / sum(weights)``, both sums taken over the whole global batch, so that
accumulation, packing and data parallelism give the number that one big batch gives.
"""

from jaxtune.training.objectives.base import Batch, Forward, Hyperparameters, Objective
from jaxtune.training.objectives.cross_entropy import cross_entropy

__all__ = ["Batch", "Forward", "Hyperparameters", "Objective", "cross_entropy"]
