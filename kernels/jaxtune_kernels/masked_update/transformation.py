"""The masked update as a gradient transformation in optax's shape, for those whose training loop is built of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxtune_kernels.dropout import hash_words
from jaxtune_kernels.masked_update import masked_update

PyTree = Any


class Transformation(NamedTuple):
    """``init(params) -> state`` and ``update(grads, state, params) -> (updates, state)``, to use in ``optax.chain``."""

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


class TransformationState(NamedTuple):
    """What :func:`masked_transformation` keeps between steps."""

    steps: Int32[Array, ""]
    blocks: PyTree


def masked_transformation(
    selection: PyTree,
    learning_rate: float | Array | Callable[[Array], Any],
    rule: str = "adamw",
    *,
    moment_dtype: Any = jnp.float32,
    seed: int = 0,
    **scalars: Any,
) -> Transformation:
    """The masked update as differences of parameters, which are zero for what is not selected.

    A gradient transformation gives updates as large as the parameters and cannot work in place: it saves the moments'
    memory, and not the time. It is left to XLA on all platforms. Gradients are those of the whole tensors, or of the
    selected blocks.

    Args:
      selection: a tree of selections like the parameters.
      learning_rate: a number, or a schedule: a function of the number of steps taken.
      rule: "adamw", "sgd" or "lion".
      moment_dtype: float32 or bfloat16.
      seed: of the stochastic rounding.
      scalars: b1, b2, epsilon, weight_decay, clip of ``masked_update(...).apply``.
    """
    optimizer = masked_update(rule, moment_dtype=moment_dtype, implementation="xla")

    def init(params: PyTree) -> TransformationState:
        return TransformationState(jnp.zeros((), jnp.int32), optimizer.init(params, selection))

    def update(grads: PyTree, state: TransformationState, params: PyTree) -> tuple[PyTree, TransformationState]:
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        new, blocks = optimizer.apply(
            grads, state.blocks, params, rate, seed=hash_words(seed, state.steps.astype(jnp.uint32)), **scalars
        )
        # In float32, in which the difference of two bfloat16 of like size is exact.
        updates = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), new, params)
        return updates, TransformationState(state.steps + 1, blocks)

    return Transformation(init, update)
