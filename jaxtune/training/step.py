"""The pure training step: a function of base parameters, state, batch and hyperparameters."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtune_kernels.dropout import hash_words
from jaxtyping import Array, Float

from jaxtune.models import Params, merge
from jaxtune.training.bound import BoundModel
from jaxtune.training.objectives import Batch, Forward, Hyperparameters, Objective
from jaxtune.training.optimizer import AdamW
from jaxtune.training.schedules import Schedule, learning_rate
from jaxtune.training.state import TrainState
from jaxtune.updates import ResolvedPlan

Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled step is specialised to; everything else it takes as an argument.

    Attributes:
      static: the decoder without its arrays.
      plan: what is trained.
      objective: losses and weights from model and batch.
      schedule: the shape of the learning rate.
      accumulate: microbatches that a batch is computed in.
      remat: what the backward pass recomputes.
      dropout: whether dropout is compiled in (its rates are traced).
      kernels: what computes products with adapters and the update, one of :data:`jaxtune.models.linear.KERNELS`.
      mesh: the mesh of the parameters; kernels that XLA does not partition take it from the context.
    """

    static: Any
    plan: ResolvedPlan
    objective: Objective
    schedule: Schedule
    accumulate: int
    remat: str
    dropout: bool
    kernels: str
    mesh: jax.sharding.Mesh

    @property
    def optimizer(self) -> AdamW:
        """What moves the trainable parameters."""
        return AdamW(self.plan, self.kernels)

    def forward(
        self, params: Params, trainable: Any, batch: Batch, hyperparameters: Hyperparameters, seed: Array | None
    ) -> Forward:
        """The model with the trainable parameters in place; ``seed`` is None where nothing is dropped."""
        merged, adapters = self.plan.apply(params, trainable, hyperparameters, dropout_seed=seed)
        rows = None
        if seed is not None:
            # Dropout belongs to an example's token, wherever packing and accumulation put it.
            rows = hash_words(batch["example_ids"].astype(jnp.uint32), batch["positions"].astype(jnp.uint32))
        return BoundModel(merge(self.static, merged), adapters, rows, self.remat, self.kernels)

    def losses(
        self,
        params: Params,
        trainable: Any,
        batch: Batch,
        hyperparameters: Hyperparameters,
        seed: Array | None = None,
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The objective's losses and weights; without a seed nothing is dropped (evaluation)."""
        with self._mesh_in_context():
            model = self.forward(params, trainable, batch, hyperparameters, seed)
            return self.objective(model, batch, hyperparameters)

    def step(
        self, params: Params, state: TrainState, batch: Batch, hyperparameters: Hyperparameters
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step over one global batch.

        Args:
          params: the base, in the compute dtype; never changed.
          state: the state before.
          batch: arrays of ``[b, …]``; ``b`` divides into the microbatches.
          hyperparameters: float32 scalars by dotted key.

        Returns:
          The state after, and float32 scalars: ``loss``, ``learning_rate``, ``grad_norm``, ``weight`` (the sum of the
          loss weights) and ``tokens`` (positions that are no padding).
        """
        seed = hash_words(state.seed, state.step.astype(jnp.uint32)) if self.dropout else None

        def summed(trainable: Any, microbatch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
            losses, weights = self.losses(params, trainable, microbatch, hyperparameters, seed)
            return jnp.sum(losses * weights), jnp.sum(weights)

        # The backward pass is traced here, so this too needs the mesh.
        with self._mesh_in_context():
            (loss, weight), gradients = self._accumulated(jax.value_and_grad(summed, has_aux=True), state, batch)
        # A batch without a single weighted token must not turn the parameters into NaN.
        denominator = jnp.maximum(weight, 1e-8)
        gradients = jax.tree.map(lambda gradient: gradient / denominator, gradients)
        rate = learning_rate(state.step, hyperparameters, self.schedule)
        with self._mesh_in_context():
            trainable, moments, norm = self.optimizer.apply(
                gradients, state.moments, state.trainable, rate, hyperparameters
            )
        after = TrainState(step=state.step + 1, trainable=trainable, moments=moments, seed=state.seed)
        metrics = {
            "loss": loss / denominator,
            "learning_rate": rate,
            "grad_norm": norm,
            "weight": weight,
            "tokens": jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32),
        }
        return after, metrics

    def _mesh_in_context(self) -> contextlib.AbstractContextManager[Any]:
        """Tells Pallas kernels of the mesh: XLA does not partition them, and its platform is the one they are for."""
        if self.kernels == "xla":
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def _accumulated(self, value_and_grad: Any, state: TrainState, batch: Batch) -> Any:
        """Sums of loss, weight and gradients over the microbatches."""
        if self.accumulate == 1:
            return value_and_grad(state.trainable, batch)

        def cut(array: Array) -> Array:
            # Row i goes to microbatch i mod n: each device cuts its own rows, and none move between devices.
            rows = array.reshape(array.shape[0] // self.accumulate, self.accumulate, *array.shape[1:])
            return jnp.swapaxes(rows, 0, 1)

        def body(sums: Any, microbatch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, value_and_grad(state.trainable, microbatch)), None

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        start = ((jnp.float32(0.0), jnp.float32(0.0)), zeros)
        return jax.lax.scan(body, start, jax.tree.map(cut, dict(batch)))[0]
