"""Calling an objective, perhaps a user's own: what it asks for in vain is named, and what it returns is checked."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtune.errors import UserError, kind_of, nearest
from jaxtune.evaluation.terms import Terms
from jaxtune.training.objectives.base import Batch, Forward, Hyperparameters, Objective

RESERVED = frozenset(
    {"step", "loss", "loss_standard_error", "learning_rate", "grad_norm", "weight", "tokens"}
    | {"tokens_per_second", "flops_per_second", "mfu"}
)
"""Names under which the loop records numbers of its own."""


def call(objective: Objective, model: Forward, batch: Batch, hyperparameters: Hyperparameters) -> Terms:
    """The objective's terms, with every array in float32 and weights of the losses' and the values' shape.

    Raises:
      UserError: it asks for what the batch does not hold, or does not return :class:`Terms` of arrays that fit.
    """
    name = getattr(objective, "__name__", type(objective).__name__)
    try:
        terms = objective(model, batch, hyperparameters)
    except KeyError as error:
        missing = error.args[0] if error.args else None
        if not isinstance(missing, str) or missing in batch or missing in hyperparameters:
            raise
        if "." in missing:
            known = nearest(missing, hyperparameters)
            raise UserError(
                f"the objective {name} asks for hyperparameters[{missing!r}]: none of this run{known}"
            ) from error
        raise UserError(
            f"the objective {name} reads batch[{missing!r}], which the batch lacks; it holds {', '.join(batch)}"
        ) from error
    if not isinstance(terms, Terms):
        raise UserError(
            f"the objective {name} returned {kind_of(terms)}; return jaxtune.Terms(losses, weights), and metrics=… "
            "if there are any"
        )
    losses = _array(terms.losses, f"the objective {name}: losses")
    metrics = {}
    for metric, pair in terms.metrics.items():
        if metric in RESERVED:
            raise UserError(
                f"the objective {name}: a metric cannot be called {metric!r}: the loop records one of its own"
            )
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"the objective {name}: metric {metric!r} is {kind_of(pair)}; give (values, weights)")
        where = f"the objective {name}: metric {metric!r}"
        values = _array(pair[0], f"{where}: values")
        metrics[metric] = values, _weights(pair[1], values, f"{where}: weights")
    return Terms(
        losses,
        _weights(terms.weights, losses, f"the objective {name}: weights"),
        None
        if terms.denominators is None
        else _weights(terms.denominators, losses, f"the objective {name}: denominators"),
        metrics,
    )


def _weights(given: Any, values: Float[Array, "..."], what: str) -> Float[Array, "..."]:
    weights = _array(given, what)
    if weights.shape == values.shape:
        return weights
    if weights.shape:
        raise UserError(f"{what} have the shape {weights.shape}, what they weigh has {values.shape}; both must be one")
    return jnp.broadcast_to(weights, values.shape)


def _array(given: Any, what: str) -> Float[Array, "..."]:
    try:
        array = jnp.asarray(given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} are {kind_of(given)}; an array or a number is needed") from error
    return array.astype(jnp.float32)
