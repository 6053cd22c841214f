"""Whether the steps of a study fit the memory of its devices."""

from __future__ import annotations

from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.memory import StepMemory, checked_memory
from jaxtune.training.trainer import Trainer


def check_memory(runner: TrainerRunner) -> dict[str, int]:
    """The bytes of the step of a study's own configuration, if that of its largest program fits the devices.

    Workers that a running Ray has may have other devices than this process, whose memory then says nothing of theirs.

    Args:
      runner: over the opened configuration, with the trainers of all programs of the study.

    Returns:
      See :func:`~jaxtune.training.memory.checked_memory`.

    Raises:
      UserError: it does not fit; the message names the key to lower and the nearest value that fits.
    """
    own = runner.trainer(runner.opened.config)
    if runner.search.ray_address is not None:
        step = StepMemory(runner.opened, own, runner.slots_of(own))
        return step.compiled(step.size)
    largest = max(runner.trainers, key=lambda trainer: _weight(runner, trainer))
    memory = _checked(runner, largest)
    return memory if largest is own else _checked(runner, own)


def _weight(runner: TrainerRunner, trainer: Trainer) -> tuple[int, int]:
    """What orders programs by their memory: their rows, which all activations have, and then their arrays."""
    slots = runner.slots_of(trainer)
    step = StepMemory(runner.opened, trainer, slots)
    rows = trainer.config.batch_size // trainer.config.accumulate * trainer.config.sequence_length
    return rows * slots, step.least(step.size)


def _checked(runner: TrainerRunner, trainer: Trainer) -> dict[str, int]:
    slots, searched = runner.slots_of(trainer), runner.search.space
    return checked_memory(
        runner.opened,
        trainer,
        slots,
        keys={key: f"search.space.{key}" for key in searched},
        per_slot=max(1, runner.capacity // slots),
        trials=runner.search.trials,
    )
