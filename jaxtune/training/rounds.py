"""What a plan draws on the host in the course of a run: which layers are trained next, say.

A draw follows from the run's seed, the number of the step and the rules' numbers alone. So a run that goes on from a
checkpoint draws what it would have drawn, and nothing of it needs to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.errors import UserError
from jaxtune.training.state import TrainState
from jaxtune.training.step import Program
from jaxtune.updates.resolved import Trainable


class Rounds:
    """The draws of a plan, for whoever steps.

    Args:
      program: of the steps.

    Raises:
      UserError: rules draw again in the course of a run, and the optimizer's state cannot follow.
    """

    def __init__(self, program: Program):
        self._plan = program.plan
        if program.plan.repeating and not program.optimizer.reselects:
            raise UserError(
                f"update.{program.plan.repeating[0]}.period: other layers are trained from time to time, and this "
                "optimizer keeps no state of single layers; leave period out where the method can do without, or take "
                "optimizer.kind adamw, lion or sgd"
            )
        self._repeating = bool(program.plan.repeating)
        # The number of the last state that a step returned: to read it would be to wait for that step.
        self._known: tuple[Any, int, int] | None = None

    def first(self, seed: jax.Array, values: Mapping[str, Any]) -> Trainable | None:
        """What is drawn for the first step; None where nothing ever is.

        Args:
          seed: of the state.
          values: hyperparameters, on the host.
        """
        return self._plan.drawn(int(seed), 0, values) if self._plan.draws else None

    def before(self, state: TrainState, values: Mapping[str, Any]) -> Trainable | None:
        """What is drawn before the next step of a state; None where it goes on with what it has."""
        if not self._repeating:
            return None
        self._known = (state.step, *self.number(state))
        return self.at(*self._known[1:], values)

    def at(self, step: int, seed: int, values: Mapping[str, Any]) -> Trainable | None:
        """What is drawn before a step; None where it goes on with what there is.

        Args:
          step: its number, steps done.
          seed: of the state.
          values: hyperparameters, on the host.
        """
        if not (self._repeating and self._plan.begins(step, values)):
            return None
        return self._plan.drawn(seed, step, values)

    def after(self, before: TrainState, after: TrainState) -> None:
        """Notes the state that a step returned."""
        if self._known is not None and self._known[0] is before.step:
            _, step, seed = self._known
            self._known = after.step, step + 1, seed

    def number(self, state: TrainState) -> tuple[int, int]:
        """Steps done, and the seed; read from the device only where the state is none that a step has returned."""
        if not self._repeating:
            return 0, 0
        if self._known is not None and self._known[0] is state.step:
            return self._known[1:]
        return int(state.step), int(state.seed)
