"""Adam on one matrix, with its means as bytes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jaxtune.training.per_tensor import AdamState, Numbers, Step, adam_direction


def dynamic_codes(*, signed: bool) -> Float32[np.ndarray, "256"]:
    """The numbers that a byte stands for, ascending: dynamic tree quantization (arXiv:2110.02861, section 2.1).

    Of each power of ten from 1e-6 to 1 there are twice as many as of the one below it: the middles of equal parts of
    [0.1, 1] of it; signed or twice as many without. With them stand 0 and 1.
    """
    values = [0.0, 1.0]
    for power in range(7):
        ends = np.linspace(0.1, 1.0, 2**power * (1 if signed else 2) + 1)
        middles = 10.0 ** (power - 6) * (ends[:-1] + ends[1:]) / 2
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(values, np.float32))


class Bytes(NamedTuple):
    """A matrix, byte by byte.

    Attributes:
      codes: of each number, the place of the nearest among :func:`dynamic_codes`, as a share of its block's largest.
      largest: magnitude in each block.
    """

    codes: UInt8[Array, "m n"]
    largest: Float[Array, "..."]


class QuantizedState(NamedTuple):
    """Of one matrix.

    Attributes:
      steps: done.
      mean: running mean of gradients.
      square: running mean of their squares.
    """

    steps: Int32[Array, "*n"]
    mean: Bytes
    square: Bytes


@dataclasses.dataclass(frozen=True)
class Quantized:
    """AdamW (arXiv:1711.05101, algorithm 2) on a matrix whose means are widened, moved, and made bytes again.

    Attributes:
      block: numbers that share a largest value, along the last side, or the longer one where that is shorter.
    """

    block: int

    def init(self, array: Float[Array, "m n"]) -> QuantizedState:
        """Means of zero."""
        nothing = jnp.zeros_like(array)
        return QuantizedState(jnp.int32(0), self.narrowed(nothing, signed=True), self.narrowed(nothing, signed=False))

    def point(self, array: Float[Array, "m n"], state: QuantizedState, numbers: Numbers) -> Float[Array, "m n"]:
        """At the matrix."""
        return array

    def apply(
        self, gradient: Float[Array, "m n"], state: QuantizedState, array: Float[Array, "m n"], step: Step
    ) -> tuple[Float[Array, "m n"], QuantizedState]:
        """A step by the means as they are before they become bytes."""
        wide = AdamState(state.steps, self.widened(state.mean, signed=True), self.widened(state.square, signed=False))
        direction, after = adam_direction(gradient, wide, step.numbers)
        mean, square = self.narrowed(after.mean, signed=True), self.narrowed(after.square, signed=False)
        return step.along(array, direction), QuantizedState(after.steps, mean, square)

    def narrowed(self, array: Float[Array, "m n"], *, signed: bool) -> Bytes:
        """The matrix as bytes, each the nearest that there is."""
        codes = dynamic_codes(signed=signed)
        largest = self._largest(jnp.abs(array))
        shares = array / jnp.maximum(self._spread(largest, array.shape), jnp.finfo(jnp.float32).tiny)
        middles = jnp.asarray((codes[:-1] + codes[1:]) / 2)
        return Bytes(jnp.searchsorted(middles, shares).astype(jnp.uint8), largest)

    def widened(self, stored: Bytes, *, signed: bool) -> Float[Array, "m n"]:
        """The matrix that bytes stand for."""
        codes = jnp.asarray(dynamic_codes(signed=signed))
        return codes[stored.codes.astype(jnp.int32)] * self._spread(stored.largest, stored.codes.shape)

    def _axis(self, shape: tuple[int, ...]) -> int:
        return 1 if shape[1] >= min(self.block, shape[0]) else 0

    def _largest(self, magnitudes: Float[Array, "m n"]) -> Float[Array, "..."]:
        """The largest of each block, which end where the matrix does."""
        axis = self._axis(magnitudes.shape)
        size = magnitudes.shape[axis]
        padding = [(0, -size % self.block if number == axis else 0) for number in range(2)]
        padded = jnp.pad(magnitudes, padding)
        cut = (*padded.shape[:axis], -1, self.block, *padded.shape[axis + 1 :])
        return jnp.max(padded.reshape(cut), axis=axis + 1)

    def _spread(self, largest: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "m n"]:
        """The blocks' numbers, at each number of the blocks."""
        axis = self._axis(shape)
        return jnp.take(largest, jnp.arange(shape[axis]) // self.block, axis=axis)
