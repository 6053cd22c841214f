"""Several examples in one row of fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxtune.data.examples import Example

# A batch as the training step takes it, by name; each array is [batch, sequence_length].
Batch = dict[str, np.ndarray]

# How many of the newest rows may still take an example. It bounds the search; older rows are nearly full by then.
OPEN_ROWS = 1024


def first_fit(lengths: Int[np.ndarray, " n"], capacity: int) -> list[list[int]]:
    """Packs items by first fit (Johnson, 1974): each goes to the oldest open row that has room, or to a new one.

    Args:
      lengths: positions that each item takes, in the order of packing.
      capacity: positions in a row.

    Returns:
      The rows, each the places of its items in ``lengths``, ascending.

    Raises:
      ValueError: an item does not fit in an empty row.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an example takes {int(lengths.max())} positions, a row has {capacity}")
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)
    for item, length in enumerate(lengths):
        first = max(0, len(rows) - OPEN_ROWS)
        fits = room[first : len(rows)] >= length
        row = first + int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(item)
        room[row] -= length
    return rows


def make_batch(examples: Sequence[Example], rows: Sequence[Sequence[int]], sequence_length: int) -> Batch:
    """Lays examples out in rows.

    An example of n tokens takes n - 1 positions: its tokens but the last are the inputs, its tokens but the first the
    targets.

    Args:
      examples: the examples.
      rows: the places of each row's examples, in order; an empty row is all padding.
      sequence_length: positions in a row.

    Returns:
      Arrays ``[rows, sequence_length]``: ``tokens``, ``targets`` (int32), ``weights`` (float32: loss weight of each
      target), ``positions`` (int32, from 0 in each segment), ``segment_ids`` (int32: 1, 2, … in a row, 0 on padding)
      and ``example_ids`` (int32: :attr:`Example.index`, -1 on padding).
    """
    shape = (len(rows), sequence_length)
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    batch["example_ids"] = np.full(shape, -1, np.int32)
    for number, members in enumerate(rows):
        start = 0
        for segment, member in enumerate(members, 1):
            example = examples[member]
            count = len(example.tokens) - 1
            place = (number, slice(start, start + count))
            batch["tokens"][place] = example.tokens[:-1]
            batch["targets"][place] = example.tokens[1:]
            batch["weights"][place] = example.weights[1:]
            batch["positions"][place] = np.arange(count)
            batch["segment_ids"][place] = segment
            batch["example_ids"][place] = example.index
            start += count
    return batch


def batch_shapes(batch_size: int, sequence_length: int) -> Batch:
    """A batch's arrays by name, shape and dtype, for what looks at no more; they take no memory, however large.

    Args:
      batch_size: rows.
      sequence_length: positions in a row.
    """
    empty = make_batch([], [[]], 1)
    return {name: np.broadcast_to(array, (batch_size, sequence_length)) for name, array in empty.items()}
