"""The pure training step: a function of base parameters, state, batch and hyperparameters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtune_kernels.dropout import hash_words
from jaxtyping import Array, Float

from jaxtune.errors import UserError
from jaxtune.models import Params
from jaxtune.models.decoder import Detached, EmbeddingNoise, segment_lengths
from jaxtune.models.linear import Adapter
from jaxtune.training.batches import completed
from jaxtune.training.bound import BoundModel, Lost
from jaxtune.training.objectives import Batch, Hyperparameters, Objective, Terms, call
from jaxtune.training.optimizers import Optimizer
from jaxtune.training.schedules import Schedule, learning_rate, scale_of
from jaxtune.training.state import TrainState
from jaxtune.updates import ResolvedPlan
from jaxtune.updates.observing import weight_gradients
from jaxtune.updates.resolved import Trainable
from jaxtune.updates.treatments.base import Treatment

NOISE = "train.neftune_alpha"
"""The key of the size of noise on the embeddings; a run without it has none."""
# Apart from the streams of dropout, which are named by modules.
_NOISE_STREAM = zlib.crc32(NOISE.encode())

Metrics = dict[str, Float[Array, ""]]

Sum = tuple[Float[Array, ""], Float[Array, ""]]
"""Of weighted values, and of their weights."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled step is specialised to; everything else it takes as an argument.

    Attributes:
      decoder: without its arrays.
      plan: what is trained.
      objective: terms from model and batch.
      schedule: the shape of the learning rate.
      accumulate: microbatches that a batch is computed in.
      remat: what the backward pass recomputes.
      dropout: whether dropout is compiled in (its rates are traced).
      kernels: what computes products with adapters and the update, one of :data:`jaxtune.models.linear.KERNELS`.
      mesh: the mesh of the parameters; kernels that XLA does not partition take it from the context.
      optimizer: what moves the trainable parameters; where it has a rate of its own, the schedule counts only where it
        is a function.
      start: the trained arrays that the run began from, on the host; None where adapters began at nothing. Constants of
        the program, where the objective asks for the reference.
      start_fixed: what is fixed with those.
      noise: whether noise on the embeddings is compiled in (its size is traced).
    """

    decoder: Detached
    plan: ResolvedPlan
    objective: Objective
    schedule: Schedule
    accumulate: int
    remat: str
    dropout: bool
    kernels: str
    mesh: jax.sharding.Mesh
    optimizer: Optimizer
    start: Mapping[str, Mapping[str, Any]] | None = None
    start_fixed: Mapping[str, Mapping[str, Any]] | None = None
    noise: bool = False

    def forward(
        self,
        params: Params,
        trainable: Any,
        batch: Batch,
        hyperparameters: Hyperparameters,
        seed: Array | None,
        fixed: Any = None,
    ) -> BoundModel:
        """The model with the trainable parameters in place; ``seed`` is None where nothing is dropped, nor noise added.

        Raises:
          UserError: there is a seed, and the batch holds nothing to draw by.
        """
        dropout_seed = seed if self.dropout else None
        merged, adapters = self.plan.apply(params, trainable, hyperparameters, dropout_seed, fixed, self.mesh)
        rows = noise = None
        if seed is not None:
            if "tokens" not in batch:
                raise UserError(
                    f"dropout is drawn for each of batch['tokens'], and the batch holds {', '.join(batch)}: name them "
                    "so, or set the dropout of all rules to 0 (and leave train.neftune_alpha out)"
                )
            # Dropout belongs to an example's token, wherever packing and accumulation put it.
            rows = hash_words(batch["example_ids"].astype(jnp.uint32), batch["positions"].astype(jnp.uint32))
            if self.noise:
                noise = self._noise(batch, hyperparameters, seed)
        bound = BoundModel(self.decoder, merged, adapters, rows, self.remat, self.kernels, noise=noise)
        # Who asks what the model has, as checks of types do, has not asked for the reference yet.
        start = functools.partial(Lost, self.decoder, merged, adapters, None, self.remat, self.kernels)
        if not self.plan.owned:
            start = functools.cache(functools.partial(self.reference, params))
        return dataclasses.replace(bound, start=start)

    def _noise(self, batch: Batch, hyperparameters: Hyperparameters, seed: Array) -> EmbeddingNoise:
        """NEFTune's (arXiv:2310.05914): ±α / √(L d), with a document's own length for L."""
        numbers = segment_lengths(batch["segment_ids"]) * self.decoder.config.hidden_size
        size = hyperparameters[NOISE] * jax.lax.rsqrt(numbers.astype(jnp.float32))
        return EmbeddingNoise(hash_words(seed, _NOISE_STREAM), size)

    def reference(self, params: Params) -> BoundModel:
        """The model as the run began: the base itself, and the adapter that it began from; no dropout, no gradient."""
        params = jax.lax.stop_gradient(dict(params))
        started, fixed = (jax.tree.map(jnp.asarray, dict(held or {})) for held in (self.start, self.start_fixed))
        merged, adapters = self.plan.apply(params, started, {}, fixed=fixed, mesh=self.mesh)
        return BoundModel(self.decoder, merged, adapters, None, "none", self.kernels)

    def terms(
        self,
        params: Params,
        trainable: Any,
        batch: Batch,
        hyperparameters: Hyperparameters,
        seed: Array | None = None,
        fixed: Any = None,
    ) -> Terms:
        """The objective's terms; without a seed nothing is dropped (evaluation).

        Raises:
          UserError: see :func:`jaxtune.training.objectives.calling.call`.
        """
        batch = completed(batch)
        with self._mesh_in_context():
            model = self.forward(params, trainable, batch, hyperparameters, seed, fixed)
            return call(self.objective, model, batch, hyperparameters)

    def gradients(
        self, parts: Sequence[Treatment], params: Params, batch: Batch, hyperparameters: Hyperparameters
    ) -> dict[str, Float[Array, "layers ..."]]:
        """What parts keep of the gradients of the base's weights, by path: the mean over the microbatches of a batch.

        Nothing is dropped, and no adapter counts.

        Args:
          parts: see :meth:`~jaxtune.updates.treatments.base.Treatment.of_gradient`.
          params: the base.
          batch: as for :meth:`step`.
          hyperparameters: float32 scalars by dotted key.
        """
        batch = completed(batch)

        def of_microbatch(microbatch: Batch) -> dict[str, Array]:
            def loss(adapters: Mapping[str, Adapter]) -> Float[Array, ""]:
                start = functools.cache(functools.partial(self.reference, params))
                model = BoundModel(self.decoder, params, adapters, None, self.remat, self.kernels, start=start)
                terms = call(self.objective, model, microbatch, hyperparameters)
                return jnp.sum(terms.losses * terms.weights) / jnp.maximum(_denominator(terms), 1e-8)

            return weight_gradients(parts, loss)

        with self._mesh_in_context():
            each = jax.lax.map(of_microbatch, self._microbatches(batch))
        return jax.tree.map(lambda found: jnp.mean(found, axis=0), each)

    def step(
        self, params: Params, state: TrainState, batch: Batch, hyperparameters: Hyperparameters
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step over one global batch.

        Args:
          params: the base, in the compute dtype; never changed.
          state: the state before.
          batch: arrays of ``[b, …]``; ``b`` divides into the microbatches. Of its own the step reads ``tokens``,
            ``segment_ids``, ``positions`` and ``example_ids``, and makes up what is missing; all else is for the
            objective. See :func:`jaxtune.training.batches.completed`.
          hyperparameters: float32 scalars by dotted key.

        Returns:
          The state after, and float32 scalars: ``loss``, ``learning_rate`` (not with an optax transformation, whose
          rate is its own matter), ``grad_norm``, ``weight`` (the sum of the loss weights), ``tokens`` (positions that
          are no padding, where the batch has any) and the objective's own metrics.
        """
        batch = completed(batch)
        drawn = self.dropout or self.noise
        seed = hash_words(state.seed, state.step.astype(jnp.uint32)) if drawn else None

        def summed(
            trainable: Any, microbatch: Batch
        ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]]:
            terms = self.terms(params, trainable, microbatch, hyperparameters, seed, state.fixed)
            weight, denominator = jnp.sum(terms.weights), _denominator(terms)
            metrics = {
                name: (jnp.sum(values * weights), jnp.sum(weights)) for name, (values, weights) in terms.metrics.items()
            }
            return jnp.sum(terms.losses * terms.weights), (denominator, weight, metrics)

        # The backward pass is traced here, so this too needs the mesh.
        with self._mesh_in_context():
            point = self.optimizer.point(state.trainable, state.moments, hyperparameters)
            (loss, (denominator, weight, further)), gradients = self._accumulated(summed, point, batch)
        # A batch without a single weighted token must not turn the parameters into NaN.
        denominator = jnp.maximum(denominator, 1e-8)
        gradients = jax.tree.map(lambda gradient: gradient / denominator, gradients)
        rate = self._rate(state, hyperparameters)
        with self._mesh_in_context():
            trainable, moments, norm = self.optimizer.apply(
                gradients, state.moments, state.trainable, rate, hyperparameters, loss / denominator
            )
        if factors := self.plan.layer_factors(state.fixed, hyperparameters):
            trainable = _damped(state.trainable, trainable, factors)
        after = dataclasses.replace(state, step=state.step + 1, trainable=trainable, moments=moments)
        metrics = {"loss": loss / denominator, "grad_norm": norm, "weight": weight}
        if self.optimizer.scheduled:
            metrics["learning_rate"] = rate
        if "segment_ids" in batch:
            metrics["tokens"] = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        return after, metrics | {name: total / shares for name, (total, shares) in further.items()}

    def redraw(self, state: TrainState, drawn: Trainable) -> TrainState:
        """The state of another draw, which :meth:`ResolvedPlan.drawn` gives; the model computes what it did."""
        trainable, fixed, places = self.plan.redraw(drawn, state.trainable, state.fixed)
        moments = self.optimizer.reselect(state.moments, places)
        return dataclasses.replace(state, trainable=trainable, moments=moments, fixed=fixed)

    def _rate(self, state: TrainState, hyperparameters: Hyperparameters) -> Float[Array, ""]:
        """What the optimizer's step is multiplied by."""
        if self.optimizer.scheduled:
            return learning_rate(state.step, hyperparameters, self.schedule)
        return scale_of(self.schedule, state.step) if callable(self.schedule) else jnp.float32(1.0)

    def _mesh_in_context(self) -> contextlib.AbstractContextManager[Any]:
        """Tells Pallas kernels of the mesh: XLA does not partition them, and its platform is the one they are for."""
        if self.kernels == "xla":
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def _accumulated(self, summed: Callable[[Any, Batch], Any], point: Any, batch: Batch) -> Any:
        """Sums of what ``summed`` gives, and of its gradients at a point, over the microbatches."""
        value_and_grad = jax.value_and_grad(summed, has_aux=True)
        if self.accumulate == 1:
            return value_and_grad(point, batch)

        def body(sums: Any, microbatch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, value_and_grad(point, microbatch)), None

        microbatches = self._microbatches(batch)
        # Which metrics there are is the objective's to say.
        sums = jax.eval_shape(
            lambda: summed(point, jax.tree.map(lambda rows: rows[0], microbatches)),
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (sums, point))
        return jax.lax.scan(body, zeros, microbatches)[0]

    def _microbatches(self, batch: Batch) -> Batch:
        """The batch with the microbatches on a first axis."""

        def cut(array: Array) -> Array:
            # Row i goes to microbatch i mod n: each device cuts its own rows, and none move between devices.
            rows = array.reshape(array.shape[0] // self.accumulate, self.accumulate, *array.shape[1:])
            return jnp.swapaxes(rows, 0, 1)

        return jax.tree.map(cut, dict(batch))


def _denominator(terms: Terms) -> Float[Array, ""]:
    """What the sum of the losses is divided by."""
    return jnp.sum(terms.weights if terms.denominators is None else terms.denominators)


def _damped(before: Trainable, after: Trainable, factors: Trainable) -> Trainable:
    """Parameters that have gone a part of their step, as with a rate that is so much smaller, of any optimizer."""
    result = {store: dict(parts) for store, parts in after.items()}
    for store, parts in factors.items():
        for path, factor in parts.items():

            def moved(old: Array, new: Array, factor: Array = factor) -> Array:
                return old + factor.reshape(*factor.shape, *[1] * (old.ndim - factor.ndim)) * (new - old)

            result[store][path] = jax.tree.map(moved, before[store][path], after[store][path])
    return result
