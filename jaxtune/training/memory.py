"""Whether a training step fits the memory of its devices; if it does not, which key to lower, and how far.

What the arrays of a step take is known from their shapes, and what lies between them from XLA's compiler, which counts
without allocating. That is an estimate of what a run takes: evaluations and the allocator come on top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import Config, dotted
from jaxtune.data import batch_shapes
from jaxtune.errors import UserError
from jaxtune.models import read_config
from jaxtune.models.declarations import abstract_params
from jaxtune.models.loading import quantized_config
from jaxtune.parallel import make_mesh, named_sharding
from jaxtune.parallel.platform import compute_dtype, free_bytes, platform
from jaxtune.parallel.sharding import TRIAL_AXIS
from jaxtune.training.model_directory import model_directory
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.population import Population
from jaxtune.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Size:
    """What the memory of a step depends on, of all that one could change.

    Attributes:
      batch_size: rows of a step.
      ranks: the rank that there is room for, by its key (``update.0.rank``).
      slots: of a population; None for a run by itself.
    """

    batch_size: int
    ranks: Mapping[str, int]
    slots: int | None = None


@dataclasses.dataclass(frozen=True)
class Lever:
    """A key whose value can be lowered.

    Attributes:
      key: as the user knows it.
      value: at present.
      least: lowest that makes sense.
      multiple: values are multiples of this.
      most: a higher one does nothing.
      at: the size with another value.
    """

    key: str
    value: int
    least: int
    multiple: int
    most: int
    at: Callable[[int], Size]


class StepMemory:
    """Bytes on a device that a training step takes, for other sizes as well.

    Args:
      opened: the opened configuration.
      trainer: of it, or of a variant.
      slots: of its population; None for a run by itself.
    """

    def __init__(self, opened: OpenedConfig, trainer: Trainer, slots: int | None = None):
        self.trainer, self._opened = trainer, opened
        ranks = {key: max(room.capacity for room in rooms.values()) for key, rooms in trainer.plan.rooms().items()}
        self.size = Size(trainer.config.batch_size, ranks, slots)

    @property
    def free(self) -> float | int | None:
        """Bytes that a step may take on a device; None where the platform does not say."""
        free = free_bytes(self.trainer.mesh)
        # The base is there already, and is counted with the step.
        held = self._base() if platform(self.trainer.mesh) == "cpu" else 0
        return None if free is None else free + held

    def least(self, size: Size) -> int:
        """Bytes of the arrays that a step takes, by their shapes: less than this it cannot be."""
        trainer = self._resized(size)
        state = jax.tree.map(
            lambda leaf, sharding: _bytes(leaf, sharding), trainer.abstract_state(), trainer.state_shardings
        )
        batch = [
            _bytes(array, named_sharding(("batch", None), array.shape, trainer.mesh))
            for array in batch_shapes(size.batch_size, trainer.config.sequence_length).values()
        ]
        slots = 1 if size.slots is None else size.slots // trainer.mesh.shape[TRIAL_AXIS]
        return self._base() + slots * (sum(jax.tree.leaves(state)) + sum(batch))

    def compiled(self, size: Size) -> dict[str, int]:
        """Bytes of the compiled step (see :func:`compiled_memory`)."""
        trainer = self._resized(size)
        compile_step = trainer.compile_step if size.slots is None else Population(trainer, size.slots).compile_step
        try:
            return compiled_memory(compile_step(batch_shapes(size.batch_size, trainer.config.sequence_length)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # Compilers of accelerators give up on, or try kernels for, arrays that no device holds.
            least, more = self.least(size), int(self.free or 0)
            return {"arguments": least, "temporaries": more, "outputs": 0, "total": least + more}

    def levers(self, keys: Mapping[str, str], *, per_slot: int, trials: int) -> Iterator[Lever]:
        """What could be lowered, the most hopeful first.

        Args:
          keys: what the user calls a key of :class:`Size` (``update.0.rank``) that a search varies.
          per_slot: trials of the population for each slot.
          trials: that there are in all.
        """
        size, mesh, own = self.size, self.trainer.mesh, dotted(self._opened.config)

        def called(key: str, value: int) -> str:
            return key if own.get(key) == value else keys.get(key, key)

        ranks = [
            Lever(
                called(key, rank),
                rank,
                1,
                1,
                useful_rank(self.trainer, key),
                lambda value, key=key: dataclasses.replace(size, ranks={**size.ranks, key: value}),
            )
            for key, rank in sorted(size.ranks.items(), key=lambda item: -item[1])
        ]
        yield from (lever for lever in ranks if lever.value > lever.most)
        parts = mesh.shape[TRIAL_AXIS]
        if size.slots is not None and size.slots > parts:
            yield Lever(
                "search.population",
                size.slots * per_slot,
                parts * per_slot,
                parts * per_slot,
                -(-trials // (parts * per_slot)) * parts * per_slot,
                lambda value: dataclasses.replace(size, slots=value // per_slot),
            )
        rows = mesh.shape["data"] * mesh.shape["fsdp"] * self.trainer.config.accumulate
        if size.batch_size > rows:
            yield Lever(
                called("train.batch_size", size.batch_size),
                size.batch_size,
                rows,
                rows,
                size.batch_size,
                lambda value: dataclasses.replace(size, batch_size=value),
            )
        yield from (lever for lever in ranks if 1 < lever.value <= lever.most)

    def _base(self) -> int:
        return sum(_bytes(array, array.sharding) for array in jax.tree.leaves(self.trainer.params))

    def _resized(self, size: Size) -> Trainer:
        if size.batch_size == self.size.batch_size and size.ranks == self.size.ranks:
            return self.trainer
        rules = list(self.trainer.plan.rules)
        for key, rank in size.ranks.items():
            _, index, name = key.split(".")
            rule = rules[int(index)]
            rules[int(index)] = rule.model_copy(update={name: min(getattr(rule, name), rank)})
        train = self.trainer.config.model_copy(update={"batch_size": size.batch_size})
        config = self._opened.config.model_copy(update={"train": train, "update": rules})
        return self._opened.trainer(config, capacity=size.ranks, dropout=self.trainer.program.dropout)


def checked_memory(
    opened: OpenedConfig,
    trainer: Trainer,
    slots: int | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    per_slot: int = 1,
    trials: int = 1,
) -> dict[str, int]:
    """The bytes of the compiled step of a trainer, if they fit its devices.

    Args:
      opened: the opened configuration.
      trainer: of it, or of a variant.
      slots: see :class:`StepMemory`.
      keys: see :meth:`StepMemory.levers`, as the others.
      per_slot: trials of the population for each slot.
      trials: that there are in all.

    Returns:
      What :func:`compiled_memory` does, and ``free``: the bytes that there are, where the platform tells.

    Raises:
      UserError: they do not fit; the message names the key to lower and the nearest value that fits.
    """
    step = StepMemory(opened, trainer, slots)
    free = step.free
    needed = step.least(step.size)
    memory: dict[str, int] = {}
    if free is None or needed <= free:
        memory = step.compiled(step.size)
        needed = memory["total"]
    if free is None or needed <= free:
        return memory if free is None else {**memory, "free": int(free)}
    about = "" if memory else "at least "
    what = f"a training step takes {about}{gib(needed)} (an estimate), and {_whose(trainer.mesh)} {gib(free)} free"
    levers = list(step.levers(keys or {}, per_slot=per_slot, trials=trials))
    for lever in levers:
        if (value := _nearest(step, lever, needed if memory else None, free)) is not None:
            raise UserError(f"{lever.key}: with {lever.value:,} {what}; the nearest that fits is about {value:,}")
    shown = ", ".join(dict.fromkeys([*(lever.key for lever in levers), "train.sequence_length"]))
    raise UserError(
        f"{what}; lowering one of {shown} alone is not enough: lower several, take a smaller model, set model.remat to "
        "full, or spread it over more devices (parallel.fsdp, parallel.tensor)"
    )


def _nearest(step: StepMemory, lever: Lever, needed: float | int | None, free: float | int) -> int | None:
    """The largest value of a lever that fits, to two digits; None if none does.

    Memory is affine in each lever nearly all the way, so the least value and one more tell the rest.

    Args:
      step: the step.
      lever: what is lowered.
      needed: bytes with its present value; None where it was not compiled for it.
      free: bytes that there are.
    """
    if step.least(lever.at(lever.least)) > free:
        return None
    low = step.compiled(lever.at(lever.least))["total"]
    if low > free:
        return None
    high = lever.value
    if needed is None:
        # What the arrays alone leave room for bounds it, and is compiled for instead.
        first, last = step.least(lever.at(lever.least)), step.least(lever.at(high))
        high = _aligned(lever, lever.least + (free - first) * (high - lever.least) / (last - first))
        if high <= lever.least:
            return lever.least
        needed = step.compiled(lever.at(high))["total"]
    if needed > free:
        high = lever.least + (free - low) * (high - lever.least) / (needed - low)
    return _aligned(lever, min(high, lever.most))


def _aligned(lever: Lever, value: float | int) -> int:
    """Two digits of a value, rounded down to what the key can have."""
    digits = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    rounded = int(value // digits) * digits if value < lever.most else int(value)
    return max(lever.least, rounded // lever.multiple * lever.multiple)


def check_base(config: Config) -> None:
    """Refuses a model whose parameters alone exceed the memory of the devices, before it is opened.

    Raises:
      UserError: it does, or there is no such model.
    """
    mesh = make_mesh(**config.parallel.model_dump())
    decoder = quantized_config(read_config(model_directory(config)), config.model.quantize)
    arrays = abstract_params(decoder, compute_dtype(config.model.dtype, mesh), mesh)
    needed = sum(_bytes(array, array.sharding) for array in arrays.values())
    free = free_bytes(mesh)
    if free is not None and needed > free:
        raise UserError(
            f"model.path: the parameters of {config.model.path} take {gib(needed)}, and {_whose(mesh)} {gib(free)} "
            "free; take a smaller model, set model.quantize, or spread it over more devices (parallel.fsdp, "
            "parallel.tensor)"
        )


def useful_rank(trainer: Trainer, key: str) -> int:
    """The largest rank of a rule (``update.0.rank``) that a module of it can make use of: a side of its matrix."""
    return max(room.useful for room in trainer.plan.rooms()[key].values())


def compiled_memory(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program per device, from XLA's buffer assignment.

    Returns:
      ``arguments``, ``temporaries``, ``outputs``, and their sum, ``total``.
    """
    analysis = compiled.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "outputs": outputs,
        "total": arguments + temporaries + outputs,
    }


def gib(size: float | int) -> str:
    """Bytes for people: ``1.5 GiB``, ``320 MiB``."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _whose(mesh: jax.sharding.Mesh) -> str:
    if platform(mesh) != "cpu":
        return "each device has"
    return "this machine has" if mesh.size == 1 else "each of the devices that share this machine has"


def _bytes(array: Any, sharding: jax.sharding.Sharding) -> int:
    # An entry of four bits has an itemsize of one byte, and takes half of it.
    bits = 4 if array.dtype == jnp.uint4 else 8 * np.dtype(array.dtype).itemsize
    return math.prod(sharding.shard_shape(array.shape)) * bits // 8
