from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_examples import make, unpack

from jaxtune.data.packing import first_fit, make_batch


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(20, 40))
def test_first_fit_places_every_item_once_where_it_first_fits(lengths: list[int], capacity: int):
    rows = first_fit(np.asarray(lengths), capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    home = {item: number for number, row in enumerate(rows) for item in row}
    for item, length in enumerate(lengths):
        for number in range(home[item]):
            before = sum(lengths[other] for other in rows[number] if other < item)
            assert before + length > capacity
        assert sum(lengths[other] for other in rows[home[item]]) <= capacity
    # Any two neighbouring rows together are more than one row's worth, so fewer than twice the least number are used.
    assert len(rows) <= max(1, 2 * math.ceil(sum(lengths) / capacity))


def test_first_fit_by_hand():
    assert first_fit(np.asarray([5, 6, 4, 3, 2]), 10) == [[0, 2], [1, 3], [4]]
    assert first_fit(np.asarray([], np.int64), 10) == []
    with pytest.raises(ValueError, match="takes 11 positions, a row has 10"):
        first_fit(np.asarray([3, 11]), 10)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(2, 21), min_size=1, max_size=40), st.integers(20, 30), st.integers(0, 100))
def test_a_batch_holds_each_example_unchanged(lengths: list[int], sequence_length: int, seed: int):
    examples = make(lengths, seed)
    rows = first_fit(np.asarray(lengths) - 1, sequence_length)
    batch = make_batch(examples, [*rows, []], sequence_length)
    for name, array in batch.items():
        assert array.shape == (len(rows) + 1, sequence_length)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
    expected = {example.index: (example.tokens.tolist(), example.weights[1:].tolist()) for example in examples}
    assert unpack(batch) == expected


def test_a_batch_by_hand():
    first, second = make([3, 2])
    batch = make_batch([first, second], [[1, 0]], 5)
    assert batch["tokens"].tolist() == [[second.tokens[0], first.tokens[0], first.tokens[1], 0, 0]]
    assert batch["targets"].tolist() == [[second.tokens[1], first.tokens[1], first.tokens[2], 0, 0]]
    assert batch["weights"].tolist() == [[second.weights[1], first.weights[1], first.weights[2], 0, 0]]
    assert batch["positions"].tolist() == [[0, 0, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 2, 2, 0, 0]]
    assert batch["example_ids"].tolist() == [[101, 100, 100, -1, -1]]
