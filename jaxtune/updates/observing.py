"""The inputs of layers, or the gradients of their weights, in some batches: for methods whose start is made of data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxtune.errors import UserError
from jaxtune.models.declarations import Params, input_of
from jaxtune.models.decoder import Detached
from jaxtune.models.linear import AdaptedLayer, Adapter, ArraysAdapter, kept
from jaxtune.parallel import constrain
from jaxtune.updates.resolved import ResolvedPlan, Trainable
from jaxtune.updates.treatments.base import LinearTreatment, Treatment

Gradients = Callable[[Sequence[Treatment], Mapping[str, Any]], Mapping[str, np.ndarray]]
"""From parts and a batch on the host to what each, by its path, keeps of the gradients: ``[layers, …]``."""

POSITIONS = 512
"""So many positions of a batch are looked at, drawn from those whose losses count."""


def informed_start(
    plan: ResolvedPlan,
    decoder: Detached,
    params: Params,
    batches: Sequence[Mapping[str, Any]],
    gradients: Gradients,
) -> tuple[Trainable, Trainable]:
    """Trained and fixed arrays, on the host, of the methods that start from data.

    Args:
      plan: of which parts ask for batches.
      decoder: of the base.
      params: of the base.
      batches: the first ones of training, on the host; each part looks at as many as it asks for.
      gradients: of the base's weights, for parts that ask for these.

    Raises:
      UserError: the batches have no tokens with weights, or none whose losses count.
    """
    parts = [part for part in plan.parts if part.observed_batches]
    learned: dict[tuple[str, str], Any] = {}
    for number, batch in enumerate(batches):
        wanting = [part for part in parts if number < part.observed_batches]
        seen: dict[str, Mapping[str, np.ndarray]] = {}
        if of_inputs := [part for part in wanting if part.observed == "inputs"]:
            seen["inputs"] = inputs_of(of_inputs, decoder, params, batch, number)
        if of_weights := [part for part in wanting if part.observed == "gradients"]:
            seen["gradients"] = gradients(of_weights, batch)
        # Modules of one input and one room learn the same of it.
        done: dict[tuple[Any, ...], Any] = {}
        for part in wanting:
            place = part.store, part.path
            source = input_of(part.path) if part.observed == "inputs" else part.path
            same = source, part.store, part.learns
            if same not in done:
                done[same] = part.observe(seen[part.observed][source], learned.get(place))
            learned[place] = done[same]
    trainable: Trainable = {}
    fixed: Trainable = {}
    for treatment in dict.fromkeys(type(part) for part in parts):
        own = {part.path: part for part in parts if type(part) is treatment}
        made = treatment.informed(own, {path: learned[treatment.store, path] for path in own})
        trainable[treatment.store] = {path: arrays for path, (arrays, _) in made.items()}
        fixed[treatment.store] = {path: kept for path, (_, kept) in made.items()}
    return trainable, fixed


def inputs_of(
    parts: Sequence[Treatment], decoder: Detached, params: Params, batch: Mapping[str, Any], seed: int
) -> dict[str, Float[np.ndarray, "layers positions inputs"]]:
    """Inputs of modules, float32, by the path of the first module that has the same.

    Args:
      parts: whose inputs are asked for.
      decoder: of the base.
      params: of the base.
      batch: ``tokens``, ``weights`` and, perhaps, ``positions`` and ``segment_ids``, of ``[b, s]``.
      seed: of the positions that are drawn, where more than :data:`POSITIONS` count.
    """
    if "tokens" not in batch or "weights" not in batch:
        raise UserError(
            f"update: method {parts[0].store} starts from batch['tokens'] where batch['weights'] count, and the batch "
            f"holds {', '.join(batch)}; use another method with this objective"
        )
    counting = np.flatnonzero(np.asarray(batch["weights"]) > 0)
    if len(counting) > POSITIONS:
        counting = np.sort(np.random.default_rng(seed).choice(counting, POSITIONS, replace=False))
    places = np.zeros(POSITIONS, np.int32)
    places[: len(counting)] = counting
    widths = {
        input_of(part.path): (len(part.rules), part.inputs) for part in parts if isinstance(part, LinearTreatment)
    }
    arrays = [batch.get(name) for name in ("tokens", "positions", "segment_ids")]
    # One and the same module of those that share an input is looked at, whichever of them the plan has.
    found = _inputs(decoder, tuple(sorted((path, *size) for path, size in widths.items())), params, places, *arrays)
    return {path: np.asarray(rows)[:, : len(counting)] for path, rows in found.items()}


@functools.partial(jax.jit, static_argnames=("decoder", "widths"))
def _inputs(
    decoder: Detached,
    widths: tuple[tuple[str, int, int], ...],
    params: Params,
    places: Int32[Array, " positions"],
    tokens: Int32[Array, "b s"],
    positions: Int32[Array, "b s"] | None,
    segment_ids: Int32[Array, "b s"] | None,
) -> dict[str, Float[Array, "layers positions inputs"]]:
    """As what a probe of zeros would get as its gradient: so the scan over the layers hands them out, and keeps no more
    of the inputs than is asked for."""
    probes = {path: jnp.zeros((layers, len(places), width), jnp.float32) for path, layers, width in widths}

    def total(probes: dict[str, Array]) -> Float[Array, ""]:
        adapters = {
            path: ArraysAdapter(_probed, {"probe": probe}, {"places": places}) for path, probe in probes.items()
        }
        states = decoder.hidden(params, tokens, positions, segment_ids, adapters=adapters)
        return jnp.sum(states.astype(jnp.float32))

    found = jax.grad(total)(probes)
    return {path: constrain(rows, (None, None, None), decoder.mesh) for path, rows in found.items()}


def weight_gradients(
    parts: Sequence[Treatment], loss: Callable[[Mapping[str, Adapter]], Float[Array, ""]]
) -> dict[str, Float[Array, "layers ..."]]:
    """What parts keep of the gradients of their modules' weights, by path; made to be called inside ``jax.jit``.

    As what probes of zeros would get as theirs: so the scan over the layers holds the gradient of one layer's weights
    at a time, and hands out what is kept of it.

    Args:
      parts: each of a linear module.
      loss: of the model with adapters, by module path.
    """
    probes, looks = {}, {}
    for part in parts:
        assert isinstance(part, LinearTreatment)
        weights = jax.ShapeDtypeStruct((part.inputs, part.outputs), jnp.float32)
        shape = jax.eval_shape(part.of_gradient, weights).shape
        probes[part.path] = jnp.zeros((len(part.rules), *shape) if part.layered else shape, jnp.float32)
        looks[part.path] = functools.partial(_weighed, part.of_gradient)

    def total(probes: dict[str, Array]) -> Float[Array, ""]:
        return loss({path: ArraysAdapter(looks[path], {"probe": probe}) for path, probe in probes.items()})

    found = jax.grad(total)(probes)
    return {part.path: found[part.path] if part.layered else found[part.path][None] for part in parts}


def _probed(layer: AdaptedLayer) -> Float[Array, "..."]:
    frozen = layer.frozen
    rows = frozen.x.reshape(-1, frozen.x.shape[-1])[layer.whole["places"]].astype(jnp.float32)
    return _looked_at(_itself, frozen.biased(frozen.product()), jax.lax.stop_gradient(rows), layer.arrays["probe"])


def _itself(seen: Array, gradient: Array) -> Array:
    del gradient
    return seen


def _weighed(kept_of: Callable[[Array], Array], layer: AdaptedLayer) -> Float[Array, "..."]:
    frozen = layer.frozen
    y = frozen.biased(frozen.product())

    def look(x: Array, gradient: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        return kept_of(jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=jnp.float32))

    return kept(_looked_at(look, y, jax.lax.stop_gradient(frozen.x), layer.arrays["probe"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _looked_at(
    look: Callable[[Array, Array], Array], y: Float[Array, "*rows outputs"], seen: Array, probe: Array
) -> Float[Array, "*rows outputs"]:
    """Y itself; the gradient of the probe is made of what was seen and of the gradient of y."""
    del look, seen, probe
    return y


def _forward(look: Callable[[Array, Array], Array], y: Array, seen: Array, probe: Array) -> tuple[Array, Array]:
    del look, probe
    return y, seen


def _backward(look: Callable[[Array, Array], Array], seen: Array, gradient: Array) -> tuple[Array, Array, Array]:
    return gradient, jnp.zeros_like(seen), look(seen, gradient)


_looked_at.defvjp(_forward, _backward)
