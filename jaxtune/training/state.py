"""What one training step changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and replaces; the frozen base is apart from it.

    Attributes:
      step: optimizer steps done, int32 scalar.
      trainable: the float32 parameters of the update plan.
      moments: the optimizer's state: in place of each array of ``trainable``, moments by rule.
      seed: of dropout, uint32 scalar; a step draws from (seed, step).
    """

    # In transformations the fields also hold shardings and abstract arrays, so their types are not narrower.
    step: Any
    trainable: Any
    moments: Any
    seed: Any
