"""Batches that someone else made: what a step reads of them, checks, and makes up where it is left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jaxtune.errors import UserError, kind_of
from jaxtune.models.decoder import segment_positions

HostBatch = Mapping[str, Any]
"""Arrays by name, rows first."""

PER_TOKEN = ("tokens", "positions", "segment_ids", "example_ids")
"""What a step itself reads, integers of one shape ``[b, s]``; the rest is read by the objective."""


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of global host batches whose position can be saved."""

    def __next__(self) -> HostBatch: ...

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch, JSON-able."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...


class CountedBatches:
    """Any iterable as :class:`Batches`: its position is how many batches were taken, and is gone to by taking them.

    An iterable that is no iterator (a list, a loader) is begun again at its end.

    Args:
      batches: the same ones in the same order in every process that goes on from a checkpoint.
    """

    def __init__(self, batches: Iterable[HostBatch]):
        self._left = iter(batches) if isinstance(batches, Iterator) else _over_and_over(batches)
        self._taken = 0

    def __next__(self) -> HostBatch:
        try:
            batch = next(self._left)
        except StopIteration:
            # Left as it is, it would end the training loop as if all were done.
            raise UserError(
                f"the batches ended after {self._taken}, and train.steps asks for more: give an iterator without end, "
                "or an iterable that can be begun again, such as a list"
            ) from None
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """How many batches were taken."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes batches until as many are taken as then.

        Raises:
          UserError: the position is one of other batches, or an earlier one.
        """
        taken = state.get("taken")
        if not isinstance(taken, int) or taken < self._taken:
            raise UserError("the saved data position belongs to other batches; give those that training began with")
        while self._taken < taken:
            next(self)


class Ahead:
    """Batches of which the next can be looked at before they are taken.

    Args:
      batches: the same.
    """

    def __init__(self, batches: Batches):
        self._batches, self._state = batches, batches.get_state()
        self._seen: deque[tuple[HostBatch, dict[str, Any]]] = deque()

    def look(self, count: int) -> list[HostBatch]:
        """The next ones, which are still to be taken."""
        while len(self._seen) < count:
            self._seen.append((next(self._batches), self._batches.get_state()))
        return [batch for batch, _ in self._seen][:count]

    def __next__(self) -> HostBatch:
        if not self._seen:
            return next(self._batches)
        batch, self._state = self._seen.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch that was taken."""
        return self._state if self._seen else self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._seen.clear()
        self._batches.set_state(state)


def as_batches(batches: Any) -> Batches:
    """The batches as the loop takes them.

    Args:
      batches: :class:`Batches`, or any iterable of batches.

    Raises:
      UserError: they are no iterable of batches.
    """
    if isinstance(batches, Batches):
        return batches
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        one = "one batch" if isinstance(batches, Mapping) else f"a {type(batches).__name__}"
        raise UserError(f"batches: an iterable of batches is needed, each a mapping of arrays by name, not {one}")
    return CountedBatches(batches)


def _over_and_over(batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            return


def checked(batch: Any, accumulate: int = 1) -> dict[str, Any]:
    """A batch as arrays of the dtypes that a step takes.

    Args:
      batch: arrays, or what NumPy makes arrays of, by name.
      accumulate: microbatches that its rows are computed in.

    Raises:
      UserError: it is no mapping of arrays, their rows differ or do not divide, or what the step itself reads of it has
        another shape or dtype.
    """
    if not isinstance(batch, Mapping) or not batch:
        raise UserError(
            f"a batch is a mapping of arrays by name, rows first, such as tokens [b, s]; got {kind_of(batch)}"
        )
    arrays = {name: _array(name, value) for name, value in batch.items()}
    first, rows = next((name, array.shape[0]) for name, array in arrays.items())
    for name, array in arrays.items():
        if array.shape[0] != rows:
            raise UserError(f"batch[{name!r}] has {array.shape[0]} rows, but batch[{first!r}] has {rows}")
    if rows % accumulate:
        raise UserError(f"a batch of {rows} rows does not divide into train.accumulate {accumulate} microbatches")
    if "weights" in arrays:  # often a mask of booleans
        arrays["weights"] = arrays["weights"].astype(np.float32, copy=False)
    if "tokens" not in arrays:
        return arrays
    shape = arrays["tokens"].shape
    if len(shape) != 2:
        raise UserError(f"batch['tokens'] has the shape {shape}; rows of token ids are needed, [b, s]")
    for name in PER_TOKEN:
        if name not in arrays:
            continue
        array = arrays[name]
        if array.shape != shape:
            raise UserError(f"batch[{name!r}] has the shape {array.shape}, but batch['tokens'] has {shape}")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise UserError(f"batch[{name!r}] holds {array.dtype}; integers are needed")
        if array.dtype != np.int32:
            arrays[name] = array.astype(np.int32)
    return arrays


def completed(batch: HostBatch) -> dict[str, Any]:
    """A batch, inside of a program, with what was left out of it.

    Without ``segment_ids`` a row is one segment from end to end, whatever has a weight; ``positions`` count from the
    start of each segment; and each segment of each row is an example.
    """
    arrays = dict(batch)
    if "tokens" not in arrays:
        return arrays
    rows, length = arrays["tokens"].shape
    if "segment_ids" not in arrays:
        arrays["segment_ids"] = jnp.ones((rows, length), jnp.int32)
    segments = jnp.asarray(arrays["segment_ids"])
    if "positions" not in arrays:
        arrays["positions"] = segment_positions(segments)
    if "example_ids" not in arrays:
        arrays["example_ids"] = _made_examples(segments)
    return arrays


def _made_examples(segments: Int32[Array, "b s"]) -> Int32[Array, "b s"]:
    rows, length = segments.shape
    # A row has at most as many segments as positions.
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
    return jnp.where(segments > 0, first + segments - 1, -1)


def count_tokens(batch: HostBatch) -> int:
    """Positions of a host batch that are no padding; 0 where it has no tokens."""
    if "segment_ids" in batch:
        return int(np.count_nonzero(batch["segment_ids"]))
    return int(np.size(batch["tokens"])) if "tokens" in batch else 0


def count_examples(batch: HostBatch) -> int:
    """Examples of a host batch; one cut over several rows counts in each. Without ids, segments or else rows."""
    for name, least in (("example_ids", 0), ("segment_ids", 1)):
        if name in batch:
            return sum(len(np.unique(row[row >= least])) for row in np.asarray(batch[name]))
    return len(next(iter(batch.values())))


def _array(name: str, value: Any) -> Any:
    if not isinstance(value, jax.Array | np.ndarray):
        try:
            value = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"batch[{name!r}] is {kind_of(value)}, of which NumPy makes no array: {error}") from error
    numbers = value.dtype == bool or jnp.issubdtype(value.dtype, jnp.number)
    if not numbers or not value.shape:
        what = "one number" if numbers else "an array of text" if value.dtype.kind in "SUT" else kind_of(value)
        raise UserError(f"batch[{name!r}] is {what}; every array of a batch is one of numbers, rows first")
    # Where jax computes in 64 bits, a batch of NumPy's defaults must not.
    narrower = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32}.get(str(value.dtype))
    return value if narrower is None else value.astype(narrower)
