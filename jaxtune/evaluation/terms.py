"""What an objective says of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """An objective over a batch, as sums all the way.

    The step minimises ``sum(losses × weights) / sum(denominators)`` and logs, for each metric,
    ``sum(values × weights) / sum(weights)``. Every sum is taken over the whole global batch before anything is divided,
    so accumulation, packing, meshes and populations give the numbers that one big batch gives.

    Attributes:
      losses: float32, ``[b, s]``, ``[b]`` or any other shape.
      weights: of the losses, of the same shape; or one number for all.
      denominators: what the sum of the losses is divided by, of the same shape; the weights, if None.
      metrics: by name, values and their weights, of one shape; a weight may be one number for all. A metric whose
        weights are all 0 is not a number.
    """

    # In transformations the fields also hold shardings and abstract arrays, so their types are not narrower.
    losses: Any
    weights: Any
    denominators: Any = None
    metrics: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
