"""How many trials train at a time: what the configuration says, or what the devices hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxtune.data import batch_shapes
from jaxtune.errors import UserError
from jaxtune.layout import RunFiles
from jaxtune.parallel.platform import memory_bytes
from jaxtune.search.journal import read_journal
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.memory import compiled_memory
from jaxtune.training.population import Population
from jaxtune.training.trainer import Trainer

# The rest is left for evaluations, checkpoints on their way to the host, and the allocator.
_SHARE = 0.8


def population_size(runner: TrainerRunner, run_dir: Path) -> int:
    """How many trials of a study train at a time.

    For ``search.population: auto`` a study that is continued keeps what it began with. A new one takes the largest
    power of two (times the parts of the mesh's ``trial`` axis) whose step fits the devices' memory, and at most a
    quarter of its trials over all workers, so that the surrogate learns from several rounds.

    Args:
      runner: with the trainers of all programs of the study.
      run_dir: of the study.

    Raises:
      UserError: the population does not divide over the mesh's ``trial`` axis.
    """
    # An opened configuration's model always lies on a mesh.
    mesh = runner.opened.model.mesh
    assert mesh is not None
    given, parts = runner.search.population, mesh.shape["trial"]
    if given != "auto":
        if given % parts:
            nearest = -(-given // parts) * parts
            raise UserError(
                f"search.population: {given} trials do not divide over parallel.trial = {parts}; nearest: {nearest}"
            )
        return given
    if RunFiles(run_dir).journal_path.exists() and (records := read_journal(run_dir)):
        return int(records[0].get("population", 1))
    wanted = max(1, runner.search.trials // (4 * parts * runner.search.workers))
    memory = memory_bytes(mesh)
    fits = wanted
    if memory is not None:
        fits = min(fitting(trainer, _SHARE * memory, wanted) for trainer in runner.trainers)
    return parts * 2 ** int(np.log2(max(1, fits)))


def fitting(trainer: Trainer, limit: float, most: int) -> int:
    """How many slots on a device fit its memory, at least 1.

    The memory of a population's step is affine in its size (the base is held once, everything else by slot), so two
    compilations, for one and two slots, tell the rest.

    Args:
      trainer: the program of one run.
      limit: bytes of a device that may be used.
      most: the answer is at most this.
    """
    if most == 1:
        return 1
    parts = trainer.mesh.shape["trial"]
    batch = batch_shapes(trainer.config.batch_size, trainer.config.sequence_length)
    one, two = (compiled_memory(Population(trainer, parts * size).compile_step(batch))["total"] for size in (1, 2))
    return int(np.clip((limit - one) // max(two - one, 1) + 1, 1, most))
