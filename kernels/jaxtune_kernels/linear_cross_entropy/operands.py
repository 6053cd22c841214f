"""What a linear cross-entropy is computed from: terms of the logits, and what belongs to each row."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, init=False)
class Term:
    """One product in the sum that makes the logits: ``states · matrix``, or ``states · matrixᵀ``. A pytree.

    Attributes:
      states: in the compute dtype.
      matrix: ``[k, vocab]``, or ``[vocab, k]`` where ``transposed`` says so.
      transposed: whether the matrix is read transposed.
    """

    states: Float[Array, "*rows k"]
    matrix: Float[Array, "_ _"]
    transposed: bool

    # Leaves are not annotated: jax also builds this tree with other things in place of arrays.
    def __init__(self, states: Any, matrix: Any, transposed: bool = False) -> None:
        for name, value in (("states", states), ("matrix", matrix), ("transposed", transposed)):
            object.__setattr__(self, name, value)


jax.tree_util.register_dataclass(Term, data_fields=["states", "matrix"], meta_fields=["transposed"])


class Rows(NamedTuple):
    """What belongs to each row beside its states. Options are given by row: trials of a population differ in them.

    Attributes:
      targets: the class of each row.
      weights: rows of weight 0 are left out.
      label_smoothing: ε.
      z_loss: the factor on log² Z.
      soft_cap: logits become ``cap · tanh(logits / cap)``; None for no cap.
    """

    targets: Int[Array, "*rows"]
    weights: Float[Array, "*rows"]
    label_smoothing: Float[Array, "*rows"]
    z_loss: Float[Array, "*rows"]
    soft_cap: Float[Array, "*rows"] | None
