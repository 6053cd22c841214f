"""What one training step changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and replaces; the frozen base is apart from it.

    Attributes:
      step: optimizer steps done, int32 scalar.
      trainable: the float32 parameters of the update plan.
      moments: the optimizer's state, congruent with ``trainable``.
      seed: of dropout, uint32 scalar; a step draws from (seed, step).
    """

    step: Int[Array, ""]
    trainable: Any
    moments: Any
    seed: UInt32[Array, ""]
