"""When a run writes a checkpoint, and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.config.training_sections import TrainConfig

logger = logging.getLogger(__name__)

Why = Literal["evaluation", "steps", "time", "stop", "end"]

_TOLD: dict[str | None, str] = {
    "evaluation": "saved with its evaluation",
    "steps": "saved by train.checkpoint_every, train.evaluate_every or train.keep.every",
    "time": "saved by train.checkpoint_minutes",
    "stop": "saved where the run was stopped",
    "end": "saved at the end so far",
}


def tell_going_on(step: int, total: int, folder: Path, why: str | None) -> None:
    """Tells that a run goes on, from which step and why from there.

    Args:
      step: of the checkpoint.
      total: steps of the whole run.
      folder: of the checkpoints.
      why: a checkpoint was written there; those of earlier versions do not say.
    """
    logger.info("going on from step %d of %d, %s (%s)", step, total, _TOLD.get(why, "saved"), folder / str(step))


def tell_planned_anew(step: int, before: int, total: int) -> None:
    """Tells that a run is to have another length than its checkpoint was made for.

    Args:
      step: of the checkpoint.
      before: the length that its learning rates were planned for.
      total: the length now.
    """
    logger.info(
        "train.steps was %d and is %d: from step %d on, the learning rate is planned anew, as the schedule of %d steps "
        "has it there; optimizer state and order of the data go on",
        before, total, step, total,
    )  # fmt: skip


class SaveSchedule:
    """Tells after which steps a checkpoint is due: at evaluations, every so many steps, and by time.

    Of several processes the first one's clock decides, and all of them learn of it at the same step. That takes a
    message, so they do not look after every step: the first process also says how many steps may pass before the next
    look, about half of those that fit into the time left.

    Args:
      config: how often.
      clock: seconds.
    """

    def __init__(self, config: TrainConfig, clock: Callable[[], float] = time.monotonic):
        self._steps = (config.checkpoint_every or config.evaluate_every, config.keep.every)
        self._seconds = None if config.checkpoint_minutes is None else 60.0 * config.checkpoint_minutes
        self._clock = clock
        self.restart(0)

    def restart(self, step: int) -> None:
        """Counts the time anew: after a step a checkpoint was written, or the run begins there."""
        self._since, self._begin, self._look = step, self._clock(), step + 1

    def why(self, step: int, *, evaluated: bool) -> Why | None:
        """Why a checkpoint is due after a step, or None; all processes ask after every step.

        Args:
          step: optimizer steps done.
          evaluated: whether the state after it was evaluated.
        """
        by_time = self._late(step)
        if evaluated:
            return "evaluation"
        if any(every is not None and step % every == 0 for every in self._steps):
            return "steps"
        return "time" if by_time else None

    def _late(self, step: int) -> bool:
        if self._seconds is None or step < self._look:
            return False
        passed = self._clock() - self._begin
        if jax.process_count() == 1:
            return passed >= self._seconds
        steps = (step - self._since) * (self._seconds - passed) / max(passed, 1e-3) / 2
        told = np.array([passed >= self._seconds, min(max(steps, 1), 1e6)], np.int32)
        late, steps = (int(value) for value in multihost_utils.broadcast_one_to_all(told))
        self._look = step + steps
        return bool(late)
