"""The trainer: a model, an update plan and an objective, compiled into one sharded step."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.config.hyperparameters import hyperparameters as values_of
from jaxtune.config.optimizer_section import OptimizerSection
from jaxtune.config.training_sections import TrainConfig
from jaxtune.errors import UserError, nearest
from jaxtune.evaluation.loss import LossResult, evaluate_loss
from jaxtune.models import Adapter, Decoder, Params
from jaxtune.models.decoder import Detached
from jaxtune.parallel import make_mesh, named_sharding, place, replicated
from jaxtune.parallel.compiler_options import compiler_options
from jaxtune.parallel.platform import check_kernels, peak_flops
from jaxtune.telemetry.flops import StepFlops, step_flops
from jaxtune.telemetry.progress import watched
from jaxtune.telemetry.throughput import Throughput
from jaxtune.telemetry.writers import MetricWriter
from jaxtune.training.batches import Batches, HostBatch, checked
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.fit import Evaluate, FitResult, fit
from jaxtune.training.hooks import Listener, ShouldStop, never
from jaxtune.training.objectives import Objective, cross_entropy
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.rounds import Rounds
from jaxtune.training.run_options import RunOptions
from jaxtune.training.schedules import ScheduleFunction
from jaxtune.training.state import TrainState, check_alive
from jaxtune.training.step import NOISE, Metrics, Program
from jaxtune.training.transformation import Transformation
from jaxtune.updates import UpdatePlan, save_adapter
from jaxtune.updates.observing import informed_start
from jaxtune.updates.resolved import Trainable, overlaid
from jaxtune.updates.treatments.base import Treatment

Values = Mapping[str, float]


class Trainer:
    """Trains what an update plan selects of a model.

    The frozen base stays in the compute dtype and is shared by every state; what is trained is float32. Numbers marked
    as traced in the configuration (learning rate, rank, dropout, …) are arguments of the compiled step: changing them
    does not compile again.

    Args:
      model: the base, on its mesh.
      plan: which parameters are trained, and how.
      train: length, batch, seed; ``train.steps`` must be set.
      optimizer: a section of the key ``optimizer``, AdamW's by default; or any optax transformation, which then has its
        own rate, schedule, clipping and decay: ``optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-4))``.
      objective: from model and batch to :class:`~jaxtune.evaluation.terms.Terms`; next-token cross-entropy by default.
      schedule: from the steps done (0 for the first) to a factor: on ``optimizer.learning_rate``, instead of
        ``optimizer.schedule`` and its warm-up, or on what an optax transformation adds.
      capacity: largest rank per dotted key (``{"update.0.rank": 64}``) that states of this trainer may use.
      dropout: compile dropout in; by default exactly when a rule's rate is above 0.
      remat: what the backward pass recomputes: ``none``, ``dots``, ``full``.
      kernels: what computes products with adapters: ``auto``, ``xla``, ``pallas``, ``interpret``.
      start: trained arrays to start from, as :func:`~jaxtune.updates.load_adapter` gives them, instead of adapters that
        change nothing.
      start_fixed: what is fixed with those, as :func:`~jaxtune.updates.peft.load.read_adapter` gives it.

    Attributes:
      start: as given.
      start_fixed: as given.
      step_function: the pure step ``(params, state, batch, hyperparameters) -> (state, metrics)``, not jitted.
      traces: how often each program was traced (compiled): ``step``, ``evaluate``, ``redraw``,
        ``gradients``.
      rounds: what the plan draws on the host, and before which steps.
      state_shardings: how a state lies on the mesh.

    Raises:
      UserError: a rule of the plan matches nothing, the batch does not divide over the devices, or there is no length.
    """

    def __init__(
        self,
        model: Decoder,
        plan: UpdatePlan,
        train: TrainConfig,
        optimizer: OptimizerSection | optax.GradientTransformation | None = None,
        *,
        objective: Objective = cross_entropy,
        schedule: ScheduleFunction | None = None,
        capacity: Mapping[str, int] | None = None,
        dropout: bool | None = None,
        remat: str = "none",
        kernels: str = "auto",
        start: Trainable | None = None,
        start_fixed: Trainable | None = None,
    ):
        if optimizer is None:
            optimizer = OptimizerConfig()
        configured = optimizer if isinstance(optimizer, OptimizerSection) else None
        if train.steps is None:
            raise UserError(
                "train.steps: the trainer needs a number of steps (epochs are turned into steps by the data)"
            )
        self.config = train
        self.model_config = model.config
        self.mesh = model.mesh if model.mesh is not None else make_mesh(1, 1, 1, jax.local_devices()[:1])
        _check_batch(train, self.mesh)
        check_kernels(kernels, self.mesh)
        decoder, params = Detached.of(model)
        params = params if model.mesh is not None else jax.device_put(params, replicated(self.mesh))
        self.plan = plan.resolve(model, capacity or {})
        self.params = {path: array for path, array in params.items() if path not in self.plan.owned}
        # States hold these; the base is asked for its own again only where another state begins.
        self._owned = {path: _off_device(params[path]) for path in self.plan.owned}
        self.hyperparameters: dict[str, float] = {
            **values_of(train, "train."),
            **({} if configured is None else values_of(configured, "optimizer.")),
            **values_of(list(plan.rules), "update."),
        }
        if schedule is not None:
            for name in ("optimizer.warmup", "optimizer.final_scale"):
                self.hyperparameters.pop(name, None)
        self.program = Program(
            decoder=decoder,
            plan=self.plan,
            objective=objective,
            schedule=schedule or ("constant" if configured is None else configured.schedule),
            accumulate=train.accumulate,
            remat=remat,
            dropout=_drops(self.hyperparameters) if dropout is None else dropout,
            kernels=kernels,
            mesh=self.mesh,
            optimizer=optimizer.build(self.plan, kernels)
            if isinstance(optimizer, OptimizerSection)
            else Transformation(self.plan, optimizer),
            start=None if start is None else jax.tree.map(np.asarray, start),
            start_fixed=None if start_fixed is None else jax.tree.map(np.asarray, start_fixed),
            noise=NOISE in self.hyperparameters,
        )
        self.start, self.start_fixed = start, start_fixed
        self.step_function = self.program.step
        self.traces: Counter[str] = Counter()
        self.state_shardings = self._shardings()
        everywhere, options = replicated(self.mesh), compiler_options(self.mesh)
        self._init = jax.jit(self._make_state, out_shardings=self.state_shardings, compiler_options=options)
        self.rounds = Rounds(self.program)
        self._redraw = jax.jit(
            self._counted("redraw", self.program.redraw),
            donate_argnums=0,
            out_shardings=self.state_shardings,
            compiler_options=options,
        )
        self._step = jax.jit(
            self._counted("step", self.program.step),
            donate_argnums=1,
            out_shardings=(self.state_shardings, everywhere),
            compiler_options=options,
        )
        self._gradients = jax.jit(
            self._counted("gradients", self.program.gradients),
            static_argnums=0,
            out_shardings=everywhere,
            compiler_options=options,
        )
        self._apply = jax.jit(functools.partial(self.plan.apply, mesh=self.mesh))
        self._losses = jax.jit(
            self._counted("evaluate", self.program.terms), out_shardings=everywhere, compiler_options=options
        )

    def init(self, hyperparameters: Values | None = None, seed: int | None = None) -> TrainState:
        """A state at step 0, born sharded.

        Args:
          hyperparameters: overrides of single values by dotted key.
          seed: of initialisation and dropout; ``train.seed`` by default.
        """
        values = self.traced_values(hyperparameters)
        key = jax.random.key(self.config.seed if seed is None else seed)
        drawn = self.rounds.first(_own_seed(key), {**self.hyperparameters, **(hyperparameters or {})})
        return self._init({**self.params, **self._owned}, key, values, self.start, self.start_fixed, drawn)

    @property
    def observed_batches(self) -> int:
        """So many batches are looked at by methods whose start is made of data; 0 where there is none."""
        return max((part.observed_batches for part in self.plan.parts), default=0)

    def informed(self, state: TrainState, batches: Sequence[HostBatch]) -> TrainState:
        """A state at step 0 with what methods that start from data learn of batches; :meth:`fit` does it by itself.

        What an adapter has brought stays as it is. Without such methods the state is given back.

        Args:
          state: from :meth:`init`.
          batches: the first ones of training, :attr:`observed_batches` of them.

        Raises:
          UserError: they have no tokens with weights, or none whose losses count.
        """
        if not self.observed_batches:
            return state
        params = {**self.params, **self._owned}

        def gradients(parts: Sequence[Treatment], batch: HostBatch) -> dict[str, np.ndarray]:
            placed = self.place(checked(batch, self.config.accumulate))
            found = self._gradients(tuple(parts), params, placed, self.traced_values())
            return jax.tree.map(np.asarray, found)

        seen = [checked(batch) for batch in batches]
        made = informed_start(self.plan, self.program.decoder, params, seen, gradients)
        brought = self.start or {}
        trees = []
        for own, learned in zip((state.trainable, state.fixed), made, strict=True):
            kept = {
                store: {path: arrays for path, arrays in parts.items() if path not in brought.get(store, {})}
                for store, parts in learned.items()
            }
            trees.append(overlaid(own, kept))
        places = self.state_shardings.trainable, self.state_shardings.fixed
        trainable, fixed = (jax.tree.map(_put, tree, place) for tree, place in zip(trees, places, strict=True))
        return dataclasses.replace(state, trainable=trainable, fixed=fixed)

    def step(
        self, state: TrainState, batch: HostBatch, hyperparameters: Values | None = None
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step; the given state's buffers are reused for the new one.

        Args:
          state: from :meth:`init` or an earlier step.
          batch: a global batch on the host (the same in every process), or arrays placed already; rows first. The
            default objective reads ``tokens``, ``targets`` and ``weights``, all ``[b, s]``. ``segment_ids`` (0 is
            padding; a row is one segment without), ``positions`` and ``example_ids`` may be left out.
          hyperparameters: overrides of single values by dotted key.

        Returns:
          The new state, and float32 scalars on the device: ``loss``, ``learning_rate`` (not with an optax
          transformation), ``grad_norm``, ``weight``, ``tokens`` and the objective's metrics.

        Raises:
          UserError: the batch lacks what the objective reads, or its arrays do not fit; or an earlier step has used the
            state up.
        """
        check_alive(state)
        placed, values = self.place(checked(batch, self.config.accumulate)), self.traced_values(hyperparameters)
        drawn = self.rounds.before(state, {**self.hyperparameters, **(hyperparameters or {})})
        after, metrics = self._step(self.params, state if drawn is None else self._redraw(state, drawn), placed, values)
        self.rounds.after(state, after)
        return after, metrics

    def evaluate(
        self, state: TrainState, batches: Iterable[HostBatch], hyperparameters: Values | None = None
    ) -> LossResult:
        """The objective over ``batches`` without dropout, label smoothing or z-loss, with its standard error.

        Args:
          state: of this trainer.
          batches: as for :meth:`step`; see :func:`jaxtune.evaluation.loss.evaluate_loss` for which losses are one
            example's.
          hyperparameters: overrides of single values by dotted key.

        Raises:
          UserError: as :meth:`step`.
        """
        check_alive(state)
        values = self.traced_values({**(hyperparameters or {}), "train.label_smoothing": 0.0, "train.z_loss": 0.0})
        return evaluate_loss(
            lambda batch: self._losses(
                self.params, state.trainable, self.place(checked(batch)), values, None, state.fixed
            ),
            batches,
        )

    def apply(self, state: TrainState, hyperparameters: Values | None = None) -> tuple[Params, dict[str, Adapter]]:
        """What a state makes of the model: its parameters with the trained ones in place, and its adapters."""
        check_alive(state)
        return self._apply(self.params, state.trainable, self.traced_values(hyperparameters), None, state.fixed)

    def fit(
        self,
        batches: Batches | Iterable[Mapping[str, Any]],
        *,
        state: TrainState | None = None,
        hyperparameters: Values | None = None,
        until: int | None = None,
        validation: Iterable[Mapping[str, Any]] | None = None,
        evaluate: Evaluate | None = None,
        checkpoints: Checkpoints | None = None,
        writer: MetricWriter | None = None,
        listener: Listener | Literal["auto"] | None = "auto",
        should_stop: ShouldStop = never,
        evaluate_at_end: bool = True,
    ) -> FitResult:
        """Trains to the end of the schedule, or to ``until``: :func:`jaxtune.training.fit.fit` with this trainer.

        Args:
          batches: see there, as the others.
          state: where to start if there is no checkpoint; a fresh one if None.
          hyperparameters: overrides of single values by dotted key.
          until: stop after this many steps in all; the schedule stays planned for ``train.steps``.
          validation: batches whose loss is the ``validation_loss`` of an evaluation.
          evaluate: further metrics of an evaluation.
          checkpoints: where to resume from and write to.
          writer: takes the metrics of every logged step.
          listener: is told the progress; ``auto`` shows a bar where someone looks, at a terminal or in a notebook, and
            None shows nothing.
          should_stop: asked after every step; when true the loop saves a checkpoint and returns.
          evaluate_at_end: evaluate after the last step as well.
        """
        options = RunOptions(
            hyperparameters=hyperparameters,
            validation=validation,
            checkpoints=checkpoints,
            writer=writer,
            listener=watched("train") if listener == "auto" else listener,
            should_stop=should_stop,
        )
        return fit(self, batches, options, state=state, until=until, evaluate=evaluate, evaluate_at_end=evaluate_at_end)

    def step_flops(self, hyperparameters: Values | None = None) -> StepFlops:
        """Model FLOPs of one step over full rows, counted for what is trained."""
        return step_flops(
            self.model_config,
            tokens=self.config.batch_size * self.config.sequence_length,
            sequence_length=self.config.sequence_length,
            added=self.plan.flops({**self.hyperparameters, **(hyperparameters or {})}),
            full=self.plan.weight_shares(),
        )

    def throughput(self, hyperparameters: Values | None = None) -> Throughput:
        """A counter of tokens and FLOPs per second for steps of this trainer."""
        peak = peak_flops(self.mesh.devices.flat[0])
        return Throughput(self.step_flops(hyperparameters).total, None if peak is None else peak * self.mesh.size)

    def save_adapter(
        self,
        directory: str | Path,
        state: TrainState,
        *,
        base: str,
        revision: str | None = None,
        hyperparameters: Values | None = None,
    ) -> None:
        """Writes what a state trained as a PEFT adapter.

        Args:
          directory: of the adapter.
          state: the trained state.
          base: the base model's path or Hub id, as the adapter will name it.
          revision: branch, tag or commit of a Hub id, as the adapter will name it.
          hyperparameters: overrides of single values by dotted key, as in training.
        """
        check_alive(state)
        values = {**self.hyperparameters, **(hyperparameters or {})}
        save_adapter(directory, self.plan, state.trainable, values, self.model_config, base, revision, state.fixed)

    def place(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """A global host batch as arrays cut over the mesh; each process uploads the rows of its own devices."""

        def put(array: Any) -> jax.Array:
            if isinstance(array, jax.Array) and not array.is_fully_addressable:
                return array
            return place(array, ("batch",) + (None,) * (np.ndim(array) - 1), self.mesh)

        return {name: put(array) for name, array in batch.items()}

    def compile_step(self, batch: Mapping[str, Any]) -> jax.stages.Compiled:
        """The step compiled for batches of these shapes, without running it: for memory and cost analysis."""
        batch = checked(batch, self.config.accumulate)
        shapes = {
            name: jax.ShapeDtypeStruct(
                np.shape(array),
                array.dtype,
                sharding=named_sharding(("batch",) + (None,) * (np.ndim(array) - 1), np.shape(array), self.mesh),
            )
            for name, array in batch.items()
        }
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract_state(),
            self.state_shardings,
        )
        return self._step.lower(self.params, state, shapes, self.traced_values(None)).compile()

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of a state."""
        return self._abstract

    @functools.cached_property
    def _abstract(self) -> TrainState:
        params = {**self.params, **self._owned}
        return jax.eval_shape(self._make_state, params, jax.random.key(0), self.traced_values(None))

    def _make_state(
        self,
        params: Any,
        key: jax.Array,
        hyperparameters: Mapping[str, jax.Array],
        start: Trainable | None = None,
        start_fixed: Trainable | None = None,
        drawn: Trainable | None = None,
    ) -> TrainState:
        trainable, fixed = self.plan.start(key, params, hyperparameters, self.mesh)
        if drawn:
            trainable, fixed, _ = self.plan.redraw(drawn, trainable, fixed)
        for own, given in ((trainable, start), (fixed, start_fixed)):
            for store, parts in (given or {}).items():
                for path, arrays in parts.items():
                    # Copies: a step takes the buffers of the state that it is given.
                    own[store][path] = jax.tree.map(_copied, own[store][path], arrays)
        return TrainState(
            step=jnp.int32(0),
            trainable=trainable,
            moments=self.program.optimizer.init(trainable),
            seed=_own_seed(key),
            fixed=fixed,
        )

    def _shardings(self) -> TrainState:
        everywhere = replicated(self.mesh)
        abstract = self.abstract_state()

        def placed(tree: Any, axes: Any) -> Any:
            return jax.tree.map(lambda leaf, names: named_sharding(names, leaf.shape, self.mesh), tree, axes)

        moments = self.program.optimizer.shardings(abstract.trainable, self.mesh)
        return TrainState(
            step=everywhere,
            trainable=placed(abstract.trainable, self.plan.axes()),
            moments=moments,
            seed=everywhere,
            fixed=placed(abstract.fixed, self.plan.fixed_axes()),
        )

    def traced_values(self, overrides: Values | None = None) -> dict[str, jax.Array]:
        """Every hyperparameter as the step takes it, float32 scalars by dotted key.

        Raises:
          UserError: a key is none of this run's, or a rank is above its capacity.
          ValueError: dropout above 0 in a program without it.
        """
        values = {**self.hyperparameters, **(overrides or {})}
        unknown = sorted(values.keys() - self.hyperparameters.keys())
        if unknown:
            raise UserError(
                f"{unknown[0]}: not a hyperparameter of this run{nearest(unknown[0], self.hyperparameters)}"
            )
        if not self.program.dropout and _drops(values):
            raise ValueError("this trainer was compiled without dropout; make it with dropout=True")
        self.plan.check(values)
        return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            self.traces[name] += 1
            return function(*arguments)

        return traced


def _own_seed(key: jax.Array) -> jax.Array:
    """The seed of a state, which what is drawn after its start goes by."""
    return jax.random.bits(jax.random.fold_in(key, 1), dtype=jnp.uint32)


def _off_device(array: Any) -> Any:
    """On the host, where one process has all of an array; shapes alone, of what is compiled and not run, stay."""
    return np.asarray(array) if isinstance(array, jax.Array) and array.is_fully_addressable else array


def _copied(like: jax.Array, array: jax.Array) -> jax.Array:
    if like.shape != array.shape:
        raise ValueError(f"start: an array has the shape {array.shape}, where the plan has {like.shape}")
    return jnp.array(array, like.dtype, copy=True)


def _put(array: Any, place: jax.sharding.Sharding) -> jax.Array:
    if isinstance(array, jax.Array):
        return array
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _drops(values: Values) -> bool:
    return any(name.endswith(".dropout") and value > 0 for name, value in values.items())


def _check_batch(train: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = train.batch_size // train.accumulate
    if rows % parts:
        valid = [str(count * parts * train.accumulate) for count in (rows // parts, rows // parts + 1) if count]
        raise UserError(
            f"train.batch_size: {train.batch_size} rows in {train.accumulate} microbatches do not divide over "
            f"{parts} devices (data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}); nearest: {' or '.join(valid)}"
        )
