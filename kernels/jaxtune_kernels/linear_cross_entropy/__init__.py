"""Cross-entropy of a linear head without its logits: ``log Z − (1 − ε) target − ε mean + z log² Z`` of each row."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune_kernels.linear_cross_entropy.blocks import Axes
from jaxtune_kernels.linear_cross_entropy.operands import Rows, Term
from jaxtune_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from jaxtune_kernels.linear_cross_entropy.xla import Layout, linear_cross_entropy_xla
from jaxtune_kernels.transforms import joined, portable, spec_of

Implementation = Literal["reference", "xla"]


def linear_cross_entropy(
    hidden: Float[Array, "*rows d"],
    head: Float[Array, "_ _"],
    targets: Int[Array, "*rows"],
    weights: Float[Array, "*rows"],
    *,
    transposed: bool = False,
    low_rank: tuple[Float[Array, "*rows r"], Float[Array, "r vocab"]] | None = None,
    label_smoothing: Float[Array, ""] | float = 0.0,
    soft_cap: Float[Array, ""] | float | None = None,
    z_loss: Float[Array, ""] | float = 0.0,
    mesh: jax.sharding.Mesh | None = None,
    row_axes: tuple[str, ...] = (),
    vocabulary_axis: str | None = None,
    trial_axes: tuple[str, ...] = (),
    block: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows"]:
    """The loss of each row under a linear head, with no array of rows × vocabulary, forward or backward.

    The losses are not multiplied by the weights, which only say which rows count: a row of weight 0 has the loss 0 and
    never meets the head. This face serves an objective ``sum(losses · weights) / sum(weights)`` better than a weighted
    sum would: losses of single tokens stay at hand for statistics, and since the gradient of a row's loss with respect
    to its hidden state depends on no other row, it is made in the forward pass and only scaled in the backward pass.

    The logits are ``hidden · head``, or ``hidden · headᵀ``, capped to ``soft_cap · tanh(logits / soft_cap)`` (Gemma 2,
    arXiv:2408.00118, section 2). Label smoothing ε: arXiv:1512.00567, section 7; z-loss: arXiv:2204.02311, section 5.

    Sums are float32; operands of matmuls have hidden's dtype, and the gradient of the logits is rounded to it. There
    are exact gradients with respect to hidden, head and both parts of ``low_rank``; only those asked for cost anything.
    Derivatives of these gradients do hold the logits.

    Args:
      hidden: states, in the compute dtype.
      head: ``[d, vocab]``; a tied embedding table ``[vocab, d]`` where ``transposed``, which is not copied.
      targets: the class of each row, from 0 to vocab - 1; any other makes the row's loss and gradient NaN.
      weights: rows of weight 0 are left out.
      transposed: whether head is ``[vocab, d]``.
      low_rank: t and B of a term ``t · B`` that is added to the logits before the cap: an adapter of the head, with
        t = scale · (dropout(hidden) · A).
      label_smoothing: ε, the share of the target's probability that all classes divide; may be traced.
      soft_cap: a positive number, or None for no cap; may be traced.
      z_loss: the factor on the square of log Z; may be traced.
      mesh: the mesh that the operands lie on; None for one device.
      row_axes: axes of the mesh that the first dimension of the rows is cut over.
      vocabulary_axis: the axis of the mesh that head's vocabulary is cut over.
      trial_axes: axes of the mesh that trials, mapped by ``jax.vmap``, are cut over.
      block: rows that are processed at once on each device; None chooses for the shape.
      implementation: "reference" holds the logits, "xla" does not; None picks.

    Raises:
      ValueError: the implementation is unknown, or shapes do not fit.
      NotImplementedError: something is differentiated with respect to label_smoothing, soft_cap or z_loss.
    """
    choices = get_args(Implementation)
    if implementation is not None and implementation not in choices:
        raise ValueError(f"unknown implementation {implementation!r}; choose from {', '.join(choices)}")
    inputs, vocabulary = head.shape[::-1] if transposed else head.shape
    if inputs != hidden.shape[-1]:
        raise ValueError(f"hidden of shape {hidden.shape} does not fit a head of {inputs} × {vocabulary}")
    terms = (Term(hidden, head, transposed),)
    if low_rank is not None:
        states, matrix = low_rank
        if matrix.shape[-1] != vocabulary:
            raise ValueError(f"low_rank has {matrix.shape[-1]} classes, but head has {vocabulary}")
        terms = (*terms, Term(states.astype(hidden.dtype), matrix))

    def by_row(value: Array | float) -> Float[Array, "*rows"]:
        return jnp.broadcast_to(jnp.asarray(value, jnp.float32), targets.shape)

    cap = None if soft_cap is None else by_row(soft_cap)
    rows = Rows(targets, weights.astype(jnp.float32), by_row(label_smoothing), by_row(z_loss), cap)
    if implementation == "reference":
        function = linear_cross_entropy_reference
    elif not targets.ndim:
        raise ValueError("there must be at least one axis of rows")
    else:
        layout = Layout(block, mesh, Axes(row_axes, vocabulary_axis), trial_axes)
        function = functools.partial(linear_cross_entropy_xla, layout=layout)
    return portable(function, lambda terms, _: joined(*spec_of(terms[0].states)[:-1]))(terms, rows)


__all__ = ["linear_cross_entropy"]
