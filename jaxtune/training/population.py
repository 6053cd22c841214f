"""A population: many runs of one program, trained by one compiled step on one copy of the frozen base.

The step of a run is a pure function, so ``jax.vmap`` over state, batch and hyperparameters trains a *slot* each, and
the base is held in common. A slot that has nothing to train keeps its state: what others do never reaches it, and
another run can take its place without a new program.

A CPU's cores are busy with one slot already, and the activations of several do not fit its caches: there the slots
follow one another inside the compiled step, and an idle one takes no time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxtune.parallel.compiler_options import compiler_options
from jaxtune.parallel.platform import platform
from jaxtune.parallel.sharding import RULES, TRIAL_AXIS, named_sharding, place
from jaxtune.training.batches import checked
from jaxtune.training.state import TrainState, check_alive
from jaxtune.training.step import Metrics
from jaxtune.training.trainer import Trainer, Values
from jaxtune.updates.resolved import Trainable

TRIALS = "trials"
"""The logical axis of slots."""


SlotMetrics = dict[str, Float[Array, " k"]]


class Population:
    """Slots that train side by side.

    Every array of the states has a leading axis of slots. Within one compiled program a slot's numbers do not depend
    on what the other slots hold, to the last bit; against the same run alone (:meth:`Trainer.step`), another program,
    they agree within rounding.

    Args:
      trainer: the program of one run, whose model is shared.
      size: how many slots; on a mesh with a ``trial`` axis a multiple of that.
      batched: compute all slots at once (``jax.vmap``) instead of one after the other; by default everywhere but on
        CPUs.

    Attributes:
      traces: how often the step was traced (compiled), for the slots of :meth:`another` as well.

    Raises:
      ValueError: the slots do not divide over the ``trial`` axis.
    """

    def __init__(self, trainer: Trainer, size: int, *, batched: bool | None = None):
        self.trainer, self.size, self.traces = trainer, size, 0
        devices = trainer.mesh.shape[TRIAL_AXIS]
        self.batched = platform(trainer.mesh) != "cpu" or devices > 1 if batched is None else batched
        if size % devices:
            raise ValueError(f"{size} slots do not divide over {devices} parts of the mesh's trial axis")
        self._shardings = jax.tree.map(self._stacked_sharding, trainer.state_shardings)
        self._per_slot = NamedSharding(trainer.mesh, PartitionSpec(*RULES[TRIALS]))
        self._step = jax.jit(
            self._stepped,
            donate_argnums=1,
            out_shardings=(self._shardings, self._per_slot),
            compiler_options=compiler_options(trainer.mesh),
        )
        self._put = jax.jit(_put, donate_argnums=0, out_shardings=self._shardings)
        self._redraw = jax.jit(self._redrawn, donate_argnums=0, out_shardings=self._shardings)
        self._take = jax.jit(_take, out_shardings=trainer.state_shardings)
        self._states: TrainState | None = None
        self._values: list[dict[str, float]] = [dict(trainer.hyperparameters) for _ in range(size)]
        self._stacked_values: dict[str, jax.Array] | None = None
        # Of each slot, steps done and the seed, which is what a plan draws by.
        self._numbers = [(0, 0)] * size

    def another(self) -> Population:
        """As many empty slots more, trained by the same compiled step, which runs once for each of the two."""
        other = copy.copy(self)
        other._states = other._stacked_values = None
        other._values = [dict(self.trainer.hyperparameters) for _ in range(self.size)]
        other._numbers = [(0, 0)] * self.size
        return other

    def put(self, slot: int, state: TrainState, hyperparameters: Values | None = None) -> None:
        """Gives a slot a run's state and hyperparameters; what the slot held is gone.

        Args:
          slot: 0 … size - 1.
          state: of one run, from :meth:`Trainer.init` or :meth:`take`.
          hyperparameters: overrides of the trainer's by dotted key.

        Raises:
          UserError, ValueError: as :meth:`Trainer.traced_values`.
        """
        check_alive(state)
        self.trainer.traced_values(hyperparameters)
        self._values[slot] = {**self.trainer.hyperparameters, **(hyperparameters or {})}
        self._stacked_values = None
        if self._states is None:
            self._states = self._make()
        self._states = self._put(self._states, state, jnp.int32(slot))
        self._numbers[slot] = self.trainer.rounds.number(state)

    def take(self, slot: int) -> TrainState:
        """A copy of a slot's state, as a run of its own has it."""
        assert self._states is not None, "no slot was filled"
        return self._take(self._states, jnp.int32(slot))

    def step(self, batches: Mapping[int, Mapping[str, np.ndarray]]) -> dict[int, Mapping[str, float]]:
        """One optimizer step of every slot that has a batch; the others keep their state.

        Args:
          batches: host batches by slot, all of one shape.

        Returns:
          The metrics of those slots as :meth:`Trainer.step` gives them, read from the device at the first look.
        """
        assert self._states is not None, "no slot was filled"
        filler = next(iter(batches.values()))
        rows = [batches.get(slot, filler) for slot in range(self.size)]
        active = np.array([slot in batches for slot in range(self.size)])
        if self._stacked_values is None:
            self._stacked_values = {
                name: jax.device_put(np.array([values[name] for values in self._values], np.float32), self._per_slot)
                for name in self._values[0]
            }
        for slot in batches:
            step, seed = self._numbers[slot]
            if (drawn := self.trainer.rounds.at(step, seed, self._values[slot])) is not None:
                self._states = self._redraw(self._states, drawn, jnp.int32(slot))
            self._numbers[slot] = step + 1, seed
        self._states, metrics = self._step(
            self.trainer.params, self._states, self.place(rows), self._stacked_values, active
        )
        read = _Read(metrics)
        return {slot: _MetricsOf(read, slot) for slot in batches}

    def place(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, jax.Array]:
        """Host batches of all slots as arrays with a leading axis of slots, cut over the mesh."""
        batches = [checked(batch, self.trainer.config.accumulate) for batch in batches]
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        return {name: place(array, _axes(array.ndim - 1), self.trainer.mesh) for name, array in stacked.items()}

    def compile_step(self, batch: Mapping[str, np.ndarray]) -> jax.stages.Compiled:
        """The step compiled for batches of this shape, without running it: for memory and cost analysis."""
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct((self.size, *leaf.shape), leaf.dtype, sharding=sharding),
            self.trainer.abstract_state(),
            self._shardings,
        )
        values = {
            name: jax.ShapeDtypeStruct((self.size,), jnp.float32, sharding=self._per_slot)
            for name in self.trainer.hyperparameters
        }
        batches = {
            name: jax.ShapeDtypeStruct(
                (self.size, *array.shape),
                array.dtype,
                sharding=named_sharding(_axes(array.ndim), (self.size, *array.shape), self.trainer.mesh),
            )
            for name, array in batch.items()
        }
        active = np.ones(self.size, bool)
        return self._step.lower(self.trainer.params, state, batches, values, active).compile()

    def _stepped(
        self,
        params: Any,
        states: TrainState,
        batches: dict[str, Array],
        values: dict[str, Float[Array, " k"]],
        active: Bool[Array, " k"],
    ) -> tuple[TrainState, SlotMetrics]:
        self.traces += 1
        slots = (states, batches, values, active)
        if self.batched:
            axis = TRIAL_AXIS if self.trainer.mesh.shape[TRIAL_AXIS] > 1 else None
            return jax.vmap(functools.partial(self._slot, params), spmd_axis_name=axis)(*slots)
        return jax.lax.map(lambda slot: self._slot(params, *slot), slots)

    def _slot(
        self,
        params: Any,
        state: TrainState,
        batch: dict[str, Array],
        values: dict[str, Float[Array, ""]],
        active: Bool[Array, ""],
    ) -> tuple[TrainState, Metrics]:
        """The step of one slot; the metrics of an idle one mean nothing."""

        def step(state: TrainState) -> tuple[TrainState, Metrics]:
            return self.trainer.step_function(params, state, batch, values)

        if not self.batched:
            # Traced once, here and below.
            step = jax.jit(step)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(step, state)[1])
            return jax.lax.cond(active, step, lambda state: (state, nothing), state)
        after, metrics = step(state)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state), metrics

    def _redrawn(self, states: TrainState, drawn: Trainable, slot: Array) -> TrainState:
        return _put(states, self.trainer.program.redraw(_take(states, slot), drawn), slot)

    def _make(self) -> TrainState:
        """States of zeros: no slot is trained before it is filled."""
        abstract = self.trainer.abstract_state()
        zeros = jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros((self.size, *leaf.shape), leaf.dtype), abstract),
            out_shardings=self._shardings,
        )
        return zeros()

    def _stacked_sharding(self, sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*RULES[TRIALS], *sharding.spec))


def _axes(dimensions: int) -> tuple[str | None, ...]:
    """Logical axes of the slots' arrays of batches, each of so many dimensions."""
    return (TRIALS, "batch") + (None,) * (dimensions - 1)


def _put(states: TrainState, state: TrainState, slot: Array) -> TrainState:
    return jax.tree.map(lambda many, one: jax.lax.dynamic_update_index_in_dim(many, one, slot, 0), states, state)


def _take(states: TrainState, slot: Array) -> TrainState:
    return jax.tree.map(lambda many: jax.lax.dynamic_index_in_dim(many, slot, 0, keepdims=False), states)


class _Read:
    """The metrics of all slots, fetched once."""

    def __init__(self, metrics: SlotMetrics):
        self._metrics = metrics

    @functools.cached_property
    def host(self) -> dict[str, np.ndarray]:
        return jax.device_get(self._metrics)

    @property
    def names(self) -> Iterator[str]:
        return iter(self._metrics)


class _MetricsOf(Mapping[str, float]):
    """One slot's metrics; the device is not waited for before one of them is asked for."""

    def __init__(self, read: _Read, slot: int):
        self._read, self._slot = read, slot

    def __getitem__(self, name: str) -> float:
        return float(self._read.host[name][self._slot])

    def __iter__(self) -> Iterator[str]:
        return self._read.names

    def __len__(self) -> int:
        return len(self._read.host)
