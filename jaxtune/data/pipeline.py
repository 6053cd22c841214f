"""Examples as batches: seeded order, packing, prefetch, and a position that is resumed exactly.

Every process runs the same pipeline and takes its rows of each global batch afterwards, so the batches do not depend on
how many processes there are.

The packing is planned epoch by epoch from the examples' lengths, which are known. So a row never holds two epochs,
every example comes exactly once in an epoch, the steps in an epoch are known before training, and a position is two
numbers that are sought, not replayed. (Grain's own packers work on a stream: they mix epochs, in one row even, and the
number of rows is known only afterwards.)
"""

from __future__ import annotations

import functools
import hashlib
import math
import weakref
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from jaxtune.data.examples import Example
from jaxtune.data.packing import Batch, first_fit, make_batch
from jaxtune.errors import UserError

# Batches made ahead of the one in use.
PREFETCH = 4


class Plan:
    """Which examples stand in which row, for every epoch.

    The order of an epoch depends on (seed, epoch, number of examples) only.
    """

    def __init__(self, examples: Sequence[Example], *, sequence_length: int, seed: int | None, packing: bool):
        """Reads the lengths of all examples.

        Args:
          examples: the examples.
          sequence_length: positions in a row.
          seed: seed of the order; ``None`` keeps the examples' own.
          packing: several examples in a row, or one.

        Raises:
          UserError: there is no example, or one is longer than a row.
        """
        if not len(examples):
            raise UserError("data: no examples")
        digest = hashlib.sha256()
        lengths = np.empty(len(examples), np.int64)
        for place in range(len(examples)):
            example = examples[place]
            lengths[place] = len(example.tokens) - 1
            digest.update(example.tokens.tobytes() + example.weights.tobytes())
        if lengths.max() > sequence_length:
            place = int(lengths.argmax())
            raise UserError(
                f"data: example {examples[place].index} takes {lengths[place]} positions, more than "
                f"train.sequence_length {sequence_length}"
            )
        self.lengths = lengths
        self.fingerprint = digest.hexdigest()[:16]
        self._sequence_length = sequence_length
        self._seed = seed
        self._packing = packing

    def order(self, epoch: int) -> Int[np.ndarray, " examples"]:
        """The order of the examples in an epoch."""
        count = len(self.lengths)
        if self._seed is None:
            return np.arange(count)
        return permutation(count, f"{self._seed}/{epoch}")

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a plan lives as long as its pipeline)
    def rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch: each the places of its examples."""
        order = self.order(epoch)
        if not self._packing:
            return [[int(place)] for place in order]
        return [[int(order[item]) for item in row] for row in first_fit(self.lengths[order], self._sequence_length)]


def permutation(count: int, seed: str) -> Int[np.ndarray, " {count}"]:
    """A shuffled ``range(count)`` that is the same on every platform and with every version of NumPy and Grain.

    The numbers are sorted by the output of SplitMix64 (Steele, Lea and Flood, 2014) at their place, started from
    SHA-256 of ``seed``. (NumPy keeps no promise about its generators' streams, and Grain's index shuffle takes some
    35 ms for any number of examples below 65,536: more than an epoch of a few short steps does.)
    """
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    # Arithmetic of unsigned arrays is modulo 2^64, as the generator wants it.
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.full(count, start, np.uint64)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


class BatchIterator:
    """Batches without end, each epoch in a new order; made ahead by a thread.

    A batch may hold the last rows of one epoch and the first of the next. An error of the examples is raised here, and
    again at every further call: the iterator never goes on past it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        packing: bool,
        examples_may_change: bool = False,
    ):
        """See :func:`train_batches`."""
        self._free = {"examples"} if examples_may_change else set[str]()
        self._plan = Plan(examples, sequence_length=sequence_length, seed=seed, packing=packing)
        self._identity = {
            "examples": self._plan.fingerprint,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "seed": seed,
            "packing": packing,
        }
        batches = _Batches(examples, self._plan, batch_size, sequence_length)
        prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH)
        # Grain's iterator joins its thread when it is deleted, which fails once the interpreter has taken modules
        # apart. The list below is its only owner and is emptied in time.
        self._owned = [iter(prefetched)]
        weakref.finalize(self, self._owned.clear)
        self._failure: Exception | None = None

    @property
    def examples_per_epoch(self) -> int:
        """How many examples an epoch holds: all of them, once."""
        return len(self._plan.lengths)

    @property
    def _prefetched(self) -> grain.DatasetIterator[Batch]:
        if not self._owned:
            raise ValueError("the batches were closed")
        return self._owned[0]

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        prefetched = self._prefetched
        try:
            return next(prefetched)
        except Exception as error:
            self._failure = error
            raise

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that was returned, as plain JSON."""
        return {**self._prefetched.get_state(), "pipeline": dict(self._identity)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position: the next batch is the one that followed when the state was taken.

        Raises:
          UserError: the state was taken with other examples or another layout of batches.
        """
        taken = state["pipeline"]
        other = [
            f"{name} {taken.get(name)} (now {now})"
            for name, now in self._identity.items()
            if taken.get(name) != now and name not in self._free
        ]
        if other:
            raise UserError(f"the saved data position belongs to other batches: {', '.join(other)}")
        self._prefetched.set_state({"epoch": state["epoch"], "row": state["row"]})
        self._failure = None

    def close(self) -> None:
        """Ends the prefetching thread; no batch can be taken afterwards."""
        self._owned.clear()


class _Batches(grain.IterDataset[Batch]):
    """The batches of a plan, one after the other."""

    def __init__(self, examples: Sequence[Example], plan: Plan, batch_size: int, sequence_length: int):
        super().__init__()
        self.examples = examples
        self.plan = plan
        self.batch_size = batch_size
        self.sequence_length = sequence_length

    def __iter__(self) -> _BatchesIterator:
        return _BatchesIterator(self)


class _BatchesIterator(grain.DatasetIterator[Batch]):
    """Walks through the rows of all epochs; its state is the next row's epoch and number."""

    def __init__(self, dataset: _Batches):
        super().__init__()
        self._dataset = dataset
        self._epoch = 0
        self._row = 0

    def __next__(self) -> Batch:
        epoch, row = self._epoch, self._row
        rows: list[list[int]] = []
        try:
            while len(rows) < self._dataset.batch_size:
                planned = self._dataset.plan.rows(epoch)
                taken = planned[row : row + self._dataset.batch_size - len(rows)]
                rows += taken
                row += len(taken)
                if row == len(planned):
                    epoch, row = epoch + 1, 0
            batch = make_batch(self._dataset.examples, rows, self._dataset.sequence_length)
        except StopIteration as error:
            # Left as it is, it would end the training loop as if the data were complete.
            raise RuntimeError("the examples stopped in the middle of an epoch") from error
        self._epoch, self._row = epoch, row
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._row = int(state["epoch"]), int(state["row"])
        if self._row >= len(self._dataset.plan.rows(self._epoch)):
            # Taken over more examples than there are now.
            self._epoch, self._row = self._epoch + 1, 0


def train_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    packing: bool,
    examples_may_change: bool = False,
) -> BatchIterator:
    """Batches for training: infinite, shuffled by ``seed`` and anew in each epoch, of fixed shapes.

    Args:
      examples: the examples, each of at most ``sequence_length`` + 1 tokens.
      batch_size: rows in a (global) batch.
      sequence_length: positions in a row.
      seed: seed of the order.
      packing: several examples in a row (they never see each other: see ``segment_ids``), or one.
      examples_may_change: a position that was taken over other examples is gone on from, at its epoch and row;
        otherwise it is refused.

    Returns:
      An iterator over batches as :func:`~jaxtune.data.packing.make_batch` lays them out.

    Raises:
      UserError: there is no example, or one is longer than a row.
    """
    return BatchIterator(
        examples,
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=seed,
        packing=packing,
        examples_may_change=examples_may_change,
    )


class EvaluationBatches(Sequence[Batch]):
    """The batches of one pass in the examples' own order, made when they are asked for."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, sequence_length: int, packing: bool):
        """See :func:`evaluation_batches`."""
        self._examples = examples
        self._rows = Plan(examples, sequence_length=sequence_length, seed=None, packing=packing).rows(0)
        self._batch_size = batch_size
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        start = index % len(self) * self._batch_size
        rows = self._rows[start : start + self._batch_size]
        rows = rows + [[]] * (self._batch_size - len(rows))
        return make_batch(self._examples, rows, self._sequence_length)


def evaluation_batches(
    examples: Sequence[Example], *, batch_size: int, sequence_length: int, packing: bool
) -> EvaluationBatches:
    """Batches for evaluation: every example once, in a fixed order; the last one is filled up with rows of padding.

    Args:
      examples: the examples, each of at most ``sequence_length`` + 1 tokens.
      batch_size: rows in a (global) batch.
      sequence_length: positions in a row.
      packing: several examples in a row, or one.

    Raises:
      UserError: there is no example, or one is longer than a row.
    """
    return EvaluationBatches(examples, batch_size=batch_size, sequence_length=sequence_length, packing=packing)


def steps_of_epochs(
    examples: Sequence[Example], epochs: float | int, *, batch_size: int, sequence_length: int, seed: int, packing: bool
) -> int:
    """How many batches of :func:`train_batches` hold ``epochs`` passes over the examples.

    Exact: the packing of the very epochs that training will see is planned, and 1.1 epochs are eleven tenths, not the
    float beside it. The last batch may reach into the next epoch. Part of an epoch counts as that part of its rows,
    rounded up.

    Args:
      examples: the examples.
      epochs: passes, whole or not.
      batch_size: rows in a (global) batch.
      sequence_length: positions in a row.
      seed: seed of the order.
      packing: several examples in a row, or one.
    """
    plan = Plan(examples, sequence_length=sequence_length, seed=seed, packing=packing)
    whole, part = divmod(Fraction(repr(float(epochs))), 1)
    rows = sum(len(plan.rows(epoch)) for epoch in range(whole))
    if part:
        rows += math.ceil(part * len(plan.rows(whole)))
    return max(1, -(-rows // batch_size))
