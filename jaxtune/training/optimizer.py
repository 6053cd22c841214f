"""AdamW with traced hyperparameters, from optax's parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxtune.training.objectives.base import Hyperparameters

PyTree = Any


def _adam(hyperparameters: Hyperparameters) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        b1=hyperparameters["optimizer.beta1"],
        b2=hyperparameters["optimizer.beta2"],
        eps=hyperparameters["optimizer.epsilon"],
        mu_dtype=jnp.float32,
    )


def init_moments(trainable: PyTree, hyperparameters: Hyperparameters) -> optax.OptState:
    """First and second moments (float32, zero) of the trainable parameters, and of nothing else."""
    return _adam(hyperparameters).init(trainable)


def moment_shardings(trainable: PyTree, shardings: PyTree, rest: jax.sharding.Sharding) -> PyTree:
    """How the moments are cut: each like its parameter, and ``rest`` for what belongs to no parameter (the count)."""
    optimizer = optax.scale_by_adam()
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: rest,
    )


def adamw_update(
    gradients: PyTree,
    moments: optax.OptState,
    trainable: PyTree,
    learning_rate: Float[Array, ""],
    hyperparameters: Hyperparameters,
    scales: PyTree,
    weight_decays: PyTree,
) -> tuple[PyTree, optax.OptState, Float[Array, ""]]:
    """One AdamW step (arXiv:1711.05101, algorithm 2) after clipping by global norm (arXiv:1211.5063).

    Args:
      gradients: of the mean loss, congruent with ``trainable``.
      moments: as :func:`init_moments` made them, or the last call returned them.
      trainable: float32 parameters.
      learning_rate: of this step.
      hyperparameters: ``optimizer.clip_norm``, ``beta1``, ``beta2``, ``epsilon``.
      scales: a factor on the learning rate for each leaf, broadcastable to it.
      weight_decays: decoupled weight decay for each leaf, broadcastable to it.

    Returns:
      The new parameters, the new moments, and the gradients' norm before clipping.
    """
    norm = optax.global_norm(gradients)
    factor = jnp.minimum(1.0, hyperparameters["optimizer.clip_norm"] / jnp.maximum(norm, 1e-16))
    clipped = jax.tree.map(lambda gradient: gradient * factor, gradients)
    directions, moments = _adam(hyperparameters).update(clipped, moments, trainable)
    updated = jax.tree.map(
        lambda value, direction, scale, decay: value - learning_rate * scale * (direction + decay * value),
        trainable,
        directions,
        scales,
        weight_decays,
    )
    return updated, moments, norm
