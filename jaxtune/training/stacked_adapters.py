"""The adapters of several trained states, stacked: what their answers are generated with side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxtune.models import Adapter, Params
from jaxtune.training.state import TrainState, check_alive
from jaxtune.training.trainer import Trainer, Values


class StackedAdapters:
    """Makes one stack of adapters of up to ``size`` states of a trainer, by a program of one shape.

    Args:
      trainer: of a plan that leaves the model's own arrays as they are.
      size: of the stack. Where there are fewer states, the first stands for those that are missing.
    """

    def __init__(self, trainer: Trainer, size: int):
        assert trainer.plan.adapters_only, "parameters that are trained themselves are no adapters"
        self.size = size
        self._trainer = trainer
        self._stacked = jax.jit(self._stack)

    def __call__(self, runs: Sequence[tuple[TrainState, Values]]) -> dict[str, Adapter]:
        """The adapters by module path, without dropout; every array has a leading axis of ``size`` states.

        Args:
          runs: states, each with its overrides of the trainer's hyperparameters; at least one.

        Raises:
          UserError, ValueError: as :meth:`~jaxtune.training.trainer.Trainer.apply`.
        """
        for state, _ in runs:
            check_alive(state)
        filled = [*runs, *[runs[0]] * (self.size - len(runs))]
        return self._stacked(
            self._trainer.params,
            [(state.trainable, state.fixed) for state, _ in filled],
            [self._trainer.traced_values(values) for _, values in filled],
        )

    def _stack(self, params: Params, held: list[Any], values: list[Mapping[str, Array]]) -> dict[str, Adapter]:
        def adapters(held: Any, values: Mapping[str, Array]) -> dict[str, Adapter]:
            trainable, fixed = held
            return self._trainer.plan.apply(params, trainable, values, fixed=fixed, mesh=self._trainer.mesh)[1]

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(held, values, strict=True))
        return jax.vmap(adapters)(*stacked)
