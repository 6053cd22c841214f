"""Cross-entropy of a linear head and its derivatives, from their definition, in float64 NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """One random case; arrays of rows have the shape of ``targets``."""

    hidden: Any
    head: Any
    targets: Any
    weights: Any
    low_rank: Any
    cotangents: Any


def problem(shape, d, vocabulary, *, rank=0, transposed=False, dtype="float32", share=0.6, seed=0) -> Problem:
    """Random operands, rounded to their dtype; about ``share`` of the rows have a weight."""
    generator = np.random.default_rng(seed)

    def normal(*sizes, kind=dtype, scale=1.0):
        return jnp.asarray((scale * generator.standard_normal(sizes)).astype(jnp.dtype(kind)))

    weights = generator.random(shape) * (generator.random(shape) < share)
    return Problem(
        hidden=normal(*shape, d),
        head=normal(*((vocabulary, d) if transposed else (d, vocabulary)), scale=2 * max(d, 1) ** -0.5),
        targets=jnp.asarray(generator.integers(0, vocabulary, shape), jnp.int32),
        weights=jnp.asarray(weights, jnp.float32),
        low_rank=(normal(*shape, rank), normal(rank, vocabulary)) if rank else None,
        cotangents=normal(*shape, kind="float32"),
    )


def float64(
    problem: Problem, *, transposed=False, label_smoothing=0.0, z_loss=0.0, soft_cap=None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses, and gradients of ``sum(cotangents · losses)`` with respect to hidden, head, t and b."""
    wide = [None if a is None else np.asarray(a).astype(np.float64) for a in (problem.hidden, problem.head)]
    shape, hidden = problem.targets.shape, wide[0].reshape(problem.targets.size, wide[0].shape[-1])
    head = wide[1].T if transposed else wide[1]
    targets = np.asarray(problem.targets).ravel()
    counted = np.asarray(problem.weights).ravel() != 0
    g = np.asarray(problem.cotangents).astype(np.float64).ravel() * counted
    logits = hidden @ head
    if problem.low_rank is not None:
        t, b = (np.asarray(a).astype(np.float64) for a in problem.low_rank)
        t = t.reshape(problem.targets.size, t.shape[-1])
        logits = logits + t @ b
    slope = np.ones_like(logits)
    if soft_cap is not None:
        slope = 1.0 / np.cosh(logits / soft_cap) ** 2
        logits = soft_cap * np.tanh(logits / soft_cap)
    top = logits.max(axis=1, keepdims=True)
    log_total = (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))[:, 0]
    log_p = logits - log_total[:, None]
    wanted = np.full(logits.shape, label_smoothing / logits.shape[1])
    wanted[np.arange(len(targets)), targets] += 1.0 - label_smoothing
    losses = (-(wanted * log_p).sum(axis=1) + z_loss * log_total**2) * counted
    p = np.exp(log_p)
    slopes = (p - wanted + 2.0 * z_loss * log_total[:, None] * p) * slope * g[:, None]
    dhead = hidden.T @ slopes
    gradients = {
        "hidden": (slopes @ head.T).reshape(*shape, head.shape[0]),
        "head": dhead.T if transposed else dhead,
    }
    if problem.low_rank is not None:
        gradients |= {"t": (slopes @ b.T).reshape(*shape, b.shape[0]), "b": t.T @ slopes}
    return losses.reshape(shape), gradients
