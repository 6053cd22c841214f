"""The masked update in float64 NumPy, element by element over the whole tensor, and problems to try it on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtune_kernels import Selection

COEFFICIENTS = {"b1": 0.8, "b2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1, "clip": 0.7}
RATE = 0.02


@dataclasses.dataclass
class Problem:
    """A tensor, a selection, and the gradients of some steps."""

    params: np.ndarray
    grads: list[np.ndarray]
    block: tuple[int, int]
    selection: Selection

    @property
    def mask(self) -> np.ndarray:
        """Which elements are selected."""
        return number_of_block(self.params.shape, self.block)[1](np.asarray(self.selection.indices))


def number_of_block(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[np.ndarray, Any]:
    """The number of each element's block, written out with loops, and a function from numbers to a mask."""
    numbers = np.zeros(shape, int)
    *leading, rows, columns = shape
    number = 0
    for matrix in np.ndindex(*leading):
        for i in range(0, rows, block[0]):
            for j in range(0, columns, block[1]):
                numbers[(*matrix, slice(i, i + block[0]), slice(j, j + block[1]))] = number
                number += 1
    return numbers, lambda indices: np.isin(numbers, indices)


def problem(shape, block, share=0.5, seed=0, dtype="float32", steps=3) -> Problem:
    """A random tensor with a random selection of its blocks."""
    generator = np.random.default_rng(seed)
    size = tuple(whole if part is None else part for part, whole in zip(block, shape[-2:], strict=True))
    count = int(number_of_block(shape, size)[0].max()) + 1
    chosen = np.sort(generator.choice(count, max(1, round(share * count)), replace=False))
    params = generator.standard_normal(shape).astype(jnp.dtype(dtype))
    grads = [generator.standard_normal(shape).astype(np.float32) for _ in range(steps)]
    return Problem(params, grads, size, Selection(jnp.asarray(chosen, jnp.int32), block))


def float64_steps(rule, params, moments, grads, mask, rate=RATE, first=1, b1=0.9, b2=0.999, epsilon=1e-8,
                  weight_decay=0.0, clip=1.0):  # fmt: skip
    """Parameters and dense moments after the steps; ``first`` is the number of the first step, for each element."""
    # The kernels are given float32 scalars: what that rounds off is not their error.
    rate, b1, b2, epsilon, weight_decay, clip = (
        np.float64(np.float32(v)) for v in (rate, b1, b2, epsilon, weight_decay, clip)
    )
    p, moments = np.asarray(params).astype(np.float64), [np.asarray(m).astype(np.float64) for m in moments]
    for number, grad in enumerate(grads):
        g, t = clip * np.asarray(grad).astype(np.float64), first + number
        if rule == "adamw":
            m, v = moments
            new = [b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g]
            direction = new[0] / (1 - b1**t) / (np.sqrt(new[1] / (1 - b2**t)) + epsilon)
        elif rule == "sgd":
            new = [b1 * moments[0] + g]
            direction = new[0]
        else:
            direction = np.sign(b1 * moments[0] + (1 - b1) * g)
            new = [b2 * moments[0] + (1 - b2) * g]
        p = np.where(mask, p - rate * (direction + weight_decay * p), p)
        moments = [np.where(mask, n, m) for n, m in zip(new, moments, strict=True)]
    return p, moments


def dense(moment, indices, shape, block, fill=0.0) -> np.ndarray:
    """Moments of the selected blocks, spread over a tensor of zeros; what sticks out must be zero and is cut off."""
    out = np.full(shape, fill, np.float64)
    numbers, _ = number_of_block(shape, block)
    matrix_rows, columns = shape[-2:]
    grid = -(-matrix_rows // block[0]), -(-columns // block[1])
    for slot, index in enumerate(np.asarray(indices)):
        i, j = index // grid[1] % grid[0], index % grid[1]
        rows = min(block[0], matrix_rows - i * block[0])
        wide = min(block[1], columns - j * block[1])
        values = np.asarray(moment[slot]).astype(np.float64)
        assert not values[rows:].any()
        assert not values[:, wide:].any()
        out[numbers == index] = values[:rows, :wide].reshape(-1)
    return out
