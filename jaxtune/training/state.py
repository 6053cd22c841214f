"""What one training step changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxtune.errors import UserError


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState:
    """Everything a step reads and replaces; the frozen base is apart from it.

    Attributes:
      step: optimizer steps done, int32 scalar.
      trainable: the float32 parameters of the update plan.
      moments: the optimizer's state: in place of each array of ``trainable``, moments by rule; or what an optax
        transformation keeps.
      seed: of dropout, uint32 scalar; a step draws from (seed, step).
      fixed: what the update plan keeps beside its trainable arrays and no step moves. Where there is nothing of the
        kind it is no part of the tree, nor of what is written of a state.
    """

    # In transformations the fields also hold shardings and abstract arrays, so their types are not narrower.
    step: Any
    trainable: Any
    moments: Any
    seed: Any
    fixed: Any = dataclasses.field(default_factory=dict)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], bool]:
        """The fields with their names, and whether ``fixed`` is among them."""
        has_fixed = not (isinstance(self.fixed, dict) and not self.fixed)
        names = [field.name for field in dataclasses.fields(self) if has_fixed or field.name != "fixed"]
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names), has_fixed

    @classmethod
    def tree_unflatten(cls, has_fixed: bool, fields: Iterable[Any]) -> TrainState:
        """The state of these fields."""
        del has_fixed
        return cls(*fields)

    def copy(self) -> TrainState:
        """A state of the same values with buffers of its own, which a step of this one does not use up.

        Raises:
          UserError: a step has used them up already.
        """
        check_alive(self)
        return jax.tree.map(jnp.copy, self)

    def __repr__(self) -> str:
        arrays = jax.tree.leaves((self.trainable, self.moments))
        if _is_used_up(self):
            return "TrainState(used up by a step)"
        step = f"step={self.step}, " if getattr(self.step, "shape", None) == () else ""
        return f"TrainState({step}{len(arrays)} arrays)"


def check_alive(state: Any) -> None:
    """Looks whether a state's buffers are still its own.

    Raises:
      UserError: a step was given the state before and has reused them.
    """
    if _is_used_up(state):
        raise UserError(
            "this state was used up: a step that was given it has reused its buffers for the state that it returned. "
            "Go on with that one (state, metrics = trainer.step(state, batch)), or give the step a copy: state.copy()"
        )


def _is_used_up(state: Any) -> bool:
    arrays = (leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
    return any(not isinstance(leaf, Tracer) and leaf.is_deleted() for leaf in arrays)
