"""Losses and gradients over blocks of rows, on one device: the arithmetic, without batching rules or meshes.

Rows that count come first, and a traced number of blocks is processed, so that rows of weight 0 never meet the head.
A block's logits are all that is ever held. Where the vocabulary is cut over devices, each holds its part of them, and
`vocabulary_axis` names the mesh axis over which maxima and sums go.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxtune_kernels.linear_cross_entropy.operands import Rows, Term
from jaxtune_kernels.transforms import varying_alike

Terms = tuple[Term, ...]


class Axes(NamedTuple):
    """Mesh axes that the operands are cut over.

    Attributes:
      rows: axes that the first dimension of the rows is cut over.
      vocabulary: the axis that the vocabulary is cut over, or None.
    """

    rows: tuple[str, ...] = ()
    vocabulary: str | None = None


class _Order(NamedTuple):
    """Rows that count before those that do not.

    Attributes:
      rows: indices of rows, those of weight 0 last, filled up to whole blocks.
      places: where each row stands in that order.
      active: number of rows that count.
      blocks: blocks that are processed.
    """

    rows: Int[Array, " padded"]
    places: Int[Array, " m"]
    active: Int[Array, ""]
    blocks: Int[Array, ""]


def _ordered(weights: Float[Array, " m"], block: int, axes: Axes) -> _Order:
    order = jnp.argsort(weights == 0, stable=True).astype(jnp.int32)
    count = jnp.sum(weights != 0, dtype=jnp.int32)
    blocks = -(-count // block)
    if axes.rows:
        # Every device goes round as often as the one with most to do, which the others wait for anyway: so the
        # collectives inside the loop are met by all.
        blocks = lax.pmax(blocks, axes.rows)
    return _Order(jnp.pad(order, (0, -len(weights) % block)), jnp.argsort(order), count, blocks)


def _taken(order: _Order, block: Int[Array, ""], size: int, *trees: Any) -> tuple[Bool[Array, " size"], Any]:
    """The rows of one block, and which of them count."""
    start = block * size
    indices = lax.dynamic_slice(order.rows, (start,), (size,))
    active = start + jnp.arange(size, dtype=jnp.int32) < order.active
    return active, jax.tree.map(lambda array: jnp.take(array, indices, axis=0, mode="clip"), trees)


def _times(left: Array, right: Array, axis: int) -> Array:
    """Contracts the last axis of ``left`` with ``axis`` of ``right``; the sum is float32."""
    return lax.dot_general(left, right, (((left.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


class _Logits(NamedTuple):
    """A block's logits after the cap, and what the cap let through: its derivative, or None without a cap."""

    values: Float[Array, "c v"]
    slope: Float[Array, "c v"] | None


def _logits(terms: Terms, soft_cap: Float[Array, " c"] | None) -> _Logits:
    logits = sum(_times(term.states, term.matrix, 1 if term.transposed else 0) for term in terms)
    assert isinstance(logits, jax.Array)
    if soft_cap is None:
        return _Logits(logits, None)
    bent = jnp.tanh(logits / soft_cap[:, None])
    return _Logits(soft_cap[:, None] * bent, 1.0 - jnp.square(bent))


def _vocabulary(terms: Terms, axes: Axes) -> tuple[int, int, Array | int]:
    """Sizes of the vocabulary and of this device's part of it, and where that part starts."""
    size = terms[0].matrix.shape[0 if terms[0].transposed else 1]
    if axes.vocabulary is None:
        return size, size, 0
    return size * lax.axis_size(axes.vocabulary), size, lax.axis_index(axes.vocabulary) * size


def _checked(values: Float[Array, " c"], rows: Rows, terms: Terms, axes: Axes) -> Float[Array, " c"]:
    """The values, NaN in rows whose target is no class."""
    size = _vocabulary(terms, axes)[0]
    return jnp.where((rows.targets >= 0) & (rows.targets < size), values, jnp.nan)


def _is_target(rows: Rows, terms: Terms, axes: Axes) -> Bool[Array, "c v"]:
    # Compared rather than gathered: this fuses into whatever reads the logits, and needs no care for who has the class.
    _, size, start = _vocabulary(terms, axes)
    return lax.broadcasted_iota(jnp.int32, (len(rows.targets), size), 1) == (rows.targets - start)[:, None]


def _summed(values: Array, axes: Axes) -> Array:
    return values if axes.vocabulary is None else lax.psum(values, axes.vocabulary)


def _losses(
    logits: Float[Array, "c v"], terms: Terms, rows: Rows, axes: Axes
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Losses of a block and the logarithms of the softmax's denominators."""
    top = jnp.max(logits, axis=-1)
    if axes.vocabulary is not None:
        top = lax.pmax(top, axes.vocabulary)
    sums = (
        jnp.sum(jnp.exp(logits - top[:, None]), axis=-1),
        jnp.sum(jnp.where(_is_target(rows, terms, axes), logits, 0.0), axis=-1),
        jnp.sum(logits, axis=-1) / _vocabulary(terms, axes)[0],
    )
    total, target, mean = _summed(jnp.stack(sums), axes)
    log_total = top + jnp.log(total)
    target = _checked(target, rows, terms, axes)
    expected = (1.0 - rows.label_smoothing) * target + rows.label_smoothing * mean
    return log_total - expected + rows.z_loss * jnp.square(log_total), log_total


def _logit_gradients(
    logits: _Logits, log_total: Float[Array, " c"], terms: Terms, rows: Rows, axes: Axes
) -> Float[Array, "c v"]:
    """Of each row's loss with respect to its logits before the cap, float32."""
    size = _vocabulary(terms, axes)[0]
    factor = _checked(1.0 + 2.0 * rows.z_loss * log_total, rows, terms, axes)
    gradients = jnp.exp(logits.values - log_total[:, None]) * factor[:, None]
    gradients = gradients - (rows.label_smoothing / size)[:, None]
    hit = _is_target(rows, terms, axes)
    gradients = gradients - jnp.where(hit, (1.0 - rows.label_smoothing)[:, None], 0.0)
    return gradients if logits.slope is None else gradients * logits.slope


def losses(
    terms: Terms, rows: Rows, *, block: int, axes: Axes, wanted: tuple[bool, ...]
) -> tuple[Float[Array, " m"], Float[Array, " m"], tuple[Float[Array, "m _"] | None, ...]]:
    """Losses, and at the same sight of the logits the gradients with respect to the states.

    Args:
      terms: of the logits, of this device's rows and part of the vocabulary.
      rows: what belongs to the rows.
      block: rows that are processed at once.
      axes: mesh axes that the operands are cut over.
      wanted: for each term, whether the gradient with respect to its states is wanted.

    Returns:
      Losses, logarithms of the softmax's denominators (both float32, 0 in rows of weight 0), and for each term the
      gradient of each row's loss with respect to its states, in their dtype, or None.
    """

    def zeros(count: int) -> tuple[Array, tuple[Array | None, ...]]:
        gradients = tuple(
            jnp.zeros((count, term.states.shape[1]), term.states.dtype) if want else None
            for term, want in zip(terms, wanted, strict=True)
        )
        return jnp.zeros((2, count), jnp.float32), gradients

    if not len(rows.weights):
        numbers, gradients = varying_alike(zeros(0), (terms, rows))
        return numbers[0], numbers[1], gradients
    order = _ordered(rows.weights, block, axes)
    start = zeros(len(order.rows))

    def body(index: Array, carry: Any) -> Any:
        numbers, gradients = carry
        active, (states, of_block) = _taken(order, index, block, tuple(term.states for term in terms), rows)
        here = _with_states(terms, states, active)
        logits = _logits(here, of_block.soft_cap)
        found = _losses(logits.values, here, of_block, axes)
        numbers = lax.dynamic_update_slice_in_dim(
            numbers, jnp.where(active, jnp.stack(found), 0.0), index * block, axis=1
        )
        if any(wanted):
            slopes = _logit_gradients(logits, found[1], here, of_block, axes)
            gradients = tuple(
                None
                if gradient is None
                else lax.dynamic_update_slice_in_dim(
                    gradient, _state_gradient(term, slopes, active, axes), index * block, axis=0
                )
                for term, gradient in zip(here, gradients, strict=True)
            )
        return numbers, gradients

    numbers, gradients = lax.fori_loop(0, order.blocks, body, varying_alike(start, (terms, rows)))
    numbers, gradients = numbers[:, order.places], jax.tree.map(lambda gradient: gradient[order.places], gradients)
    return numbers[0], numbers[1], gradients


def _with_states(terms: Terms, states: tuple[Array, ...], active: Bool[Array, " c"]) -> Terms:
    """The terms of one block; rows that do not count are zero, so that whatever they hold cannot spread."""
    return tuple(
        Term(jnp.where(active[:, None], chosen, 0), term.matrix.astype(chosen.dtype), term.transposed)
        for term, chosen in zip(terms, states, strict=True)
    )


def _state_gradient(term: Term, slopes: Float[Array, "c v"], active: Bool[Array, " c"], axes: Axes) -> Array:
    gradient = _summed(_times(slopes.astype(term.states.dtype), term.matrix, 0 if term.transposed else 1), axes)
    return jnp.where(active[:, None], gradient, 0).astype(term.states.dtype)


def matrix_gradients(
    terms: Terms,
    rows: Rows,
    log_total: Float[Array, " m"],
    cotangents: Float[Array, " m"],
    *,
    block: int,
    axes: Axes,
    wanted: tuple[bool, ...],
) -> tuple[Float[Array, "_ _"] | None, ...]:
    """Gradients with respect to the matrices of ``sum(cotangents · losses)``, float32, over all rows of all devices.

    Args:
      terms: of the logits, of this device's rows and part of the vocabulary.
      rows: what belongs to the rows.
      log_total: logarithms of the softmax's denominators, from :func:`losses`.
      cotangents: of the losses.
      block: rows that are processed at once.
      axes: mesh axes that the operands are cut over.
      wanted: for each term, whether the gradient with respect to its matrix is wanted.
    """
    start = tuple(
        jnp.zeros(term.matrix.shape, jnp.float32) if want else None for term, want in zip(terms, wanted, strict=True)
    )
    start = varying_alike(start, (terms, rows, log_total, cotangents))
    if not len(rows.weights):
        return start
    order = _ordered(rows.weights, block, axes)

    def body(index: Array, sums: Any) -> Any:
        active, (states, of_block, log_totals, factors) = _taken(
            order, index, block, tuple(term.states for term in terms), rows, log_total, cotangents
        )
        here = _with_states(terms, states, active)
        slopes = _logit_gradients(_logits(here, of_block.soft_cap), log_totals, here, of_block, axes)
        slopes = jnp.where(active[:, None], slopes * factors[:, None], 0.0)
        return tuple(
            None if sum_ is None else sum_ + _outer(term, slopes.astype(term.states.dtype))
            for term, sum_ in zip(here, sums, strict=True)
        )

    sums = lax.fori_loop(0, order.blocks, body, start)
    return sums if not axes.rows else jax.tree.map(lambda total: lax.psum(total, axes.rows), sums)


def _outer(term: Term, slopes: Array) -> Float[Array, "_ _"]:
    pair = (slopes, term.states) if term.transposed else (term.states, slopes)
    return lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
