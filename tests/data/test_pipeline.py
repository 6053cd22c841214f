from __future__ import annotations

import dataclasses
import json
import math
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_examples import make, unpack

from jaxtune.data.examples import Example
from jaxtune.data.packing import make_batch
from jaxtune.data.pipeline import Plan, evaluation_batches, permutation, steps_of_epochs, train_batches
from jaxtune.errors import UserError

LENGTHS = [2, 9, 5, 17, 3, 12, 8, 8, 2, 21, 6, 4, 15, 11, 7, 3, 10]
LAYOUT: dict[str, Any] = {"batch_size": 3, "sequence_length": 24, "seed": 5, "packing": True}


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def assert_equal(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(2, 13), min_size=1, max_size=40),
    st.integers(12, 30),
    st.integers(1, 5),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_an_epoch_holds_every_token_once(
    lengths: list[int], sequence_length: int, batch_size: int, seed: int, packing: bool
):
    examples = make(lengths)
    layout = {"batch_size": batch_size, "sequence_length": sequence_length, "seed": seed, "packing": packing}
    plan = Plan(examples, sequence_length=sequence_length, seed=seed, packing=packing)
    expected = {example.index: (example.tokens.tolist(), example.weights[1:].tolist()) for example in examples}
    batches = train_batches(examples, **layout)
    assert batches.examples_per_epoch == len(lengths)
    rows = [len(plan.rows(epoch)) for epoch in range(2)]
    stream = take(batches, -(-sum(rows) // batch_size))
    batches.close()
    for batch in stream:
        for name, array in batch.items():
            assert array.shape == (batch_size, sequence_length)
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
    joined = {name: np.concatenate([batch[name] for batch in stream]) for name in stream[0]}
    start = 0
    for count in rows:
        epoch = {name: array[start : start + count] for name, array in joined.items()}
        assert unpack(epoch) == expected
        start += count
    if not packing:
        assert rows == [len(lengths)] * 2
    assert steps_of_epochs(examples, 2, **layout) == len(stream)


def test_order_depends_on_seed_and_epoch():
    examples = make(LENGTHS)

    def order(seed: int, epoch: int) -> list[int]:
        return Plan(examples, sequence_length=24, seed=seed, packing=False).order(epoch).tolist()

    orders = [order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(one) for one in orders}) == 16
    assert all(sorted(one) == list(range(len(LENGTHS))) for one in orders)
    assert order(3, 2) == order(3, 2)


def test_order_is_the_same_everywhere():
    # Written down once: other numbers would mean that a resumed run sees other examples.
    assert permutation(12, "0/1").tolist() == [2, 0, 7, 10, 11, 8, 9, 1, 4, 6, 5, 3]


def test_orders_are_uniform():
    # Each of 5 examples stands at each of 5 places equally often: chi-square with 16 degrees of freedom, p > 1e-4.
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), permutation(5, f"{seed}/0")] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 45


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2, 5, 13])
def test_a_saved_position_is_resumed_exactly(packing: bool, at: int):
    layout = {**LAYOUT, "packing": packing}
    batches = train_batches(make(LENGTHS), **layout)
    take(batches, at)
    state = json.loads(json.dumps(batches.get_state()))
    following = take(batches, 12)
    fresh = train_batches(make(LENGTHS), **layout)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_equal(take(fresh, 12), following)
    # A pipeline that has run ahead goes back as well.
    fresh.set_state(state)
    assert_equal(take(fresh, 12), following)


def test_a_state_is_not_moved_by_prefetching():
    batches = train_batches(make(LENGTHS), **LAYOUT)
    first = batches.get_state()
    take(batches, 1)
    second = batches.get_state()
    for _ in range(3):
        assert batches.get_state() == second
    assert first != second


def test_a_state_of_other_data_is_refused():
    state = train_batches(make(LENGTHS), **LAYOUT).get_state()
    with pytest.raises(UserError, match=r"belongs to other batches: batch_size 3 \(now 4\)"):
        train_batches(make(LENGTHS), **{**LAYOUT, "batch_size": 4}).set_state(state)
    with pytest.raises(UserError, match="belongs to other batches: examples"):
        train_batches(make(LENGTHS, seed=1), **LAYOUT).set_state(state)


def test_a_position_among_other_examples_is_gone_on_from_on_purpose():
    """At its epoch and row; a row behind the end of a shorter epoch is the next one's first."""
    layout = {**LAYOUT, "packing": False, "batch_size": 1}
    batches = train_batches(make(LENGTHS), **layout)
    take(batches, len(LENGTHS) + 5)
    state = batches.get_state()
    for lengths, epoch, row in ((LENGTHS[::-1], 1, 5), (LENGTHS[:6], 1, 5), (LENGTHS[:5], 2, 0), (LENGTHS[:2], 2, 0)):
        moved = train_batches(make(lengths), **layout, examples_may_change=True)
        moved.set_state(state)
        fresh = train_batches(make(lengths), **layout)
        take(fresh, epoch * len(lengths) + row)
        assert_equal(take(moved, 4), take(fresh, 4))
    with pytest.raises(UserError, match=r"batch_size 1 \(now 4\)$"):
        train_batches(make(LENGTHS), **{**layout, "batch_size": 4}, examples_may_change=True).set_state(state)


class Failing(Example):
    """An example that cannot be read any more once ``failure`` is set."""

    failure: Exception | None = None

    def __getattribute__(self, name: str) -> Any:
        failure = object.__getattribute__(self, "failure")
        if name == "tokens" and failure is not None:
            raise failure
        return super().__getattribute__(name)


def with_a_failing_one() -> tuple[list[Example], Failing]:
    examples = make(LENGTHS)
    failing = Failing(**{field.name: getattr(examples[3], field.name) for field in dataclasses.fields(Example)})
    return [*examples[:3], failing, *examples[4:]], failing


def test_a_failing_source_stops_the_batches_with_its_error():
    examples, failing = with_a_failing_one()
    batches = train_batches(examples, **LAYOUT)
    object.__setattr__(failing, "failure", OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        take(batches, 10)
    # It never goes on past the error.
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_source_that_stops_is_an_error_too():
    examples, failing = with_a_failing_one()
    batches = train_batches(examples, **LAYOUT)
    object.__setattr__(failing, "failure", StopIteration())
    with pytest.raises(RuntimeError, match="stopped in the middle of an epoch"):
        list(batches)


def test_a_source_that_fails_at_once():
    examples, failing = with_a_failing_one()
    object.__setattr__(failing, "failure", OSError("no such disk"))
    with pytest.raises(OSError, match="no such disk"):
        train_batches(examples, **LAYOUT)


def test_nothing_and_too_much():
    with pytest.raises(UserError, match="no examples"):
        train_batches([], **LAYOUT)
    with pytest.raises(UserError, match=r"example 109 takes 20 positions, more than train.sequence_length 19"):
        train_batches(make(LENGTHS), **{**LAYOUT, "sequence_length": 19})


def test_closing_ends_the_thread():
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if "prefetch" in thread.name]

    before = threads()
    batches = train_batches(make(LENGTHS), **LAYOUT)
    next(batches)
    assert len(threads()) == len(before) + 1
    batches.close()
    assert threads() == before
    with pytest.raises(ValueError, match="were closed"):
        next(batches)


def test_equal_lengths_pack_into_the_same_steps_as_no_packing():
    # The premise of comparing a packed run with an unpacked one: the same examples in each step.
    examples = make([7] * 24)
    apart = train_batches(examples, batch_size=8, sequence_length=6, seed=1, packing=False)
    packed = train_batches(examples, batch_size=2, sequence_length=24, seed=1, packing=True)
    for one, other in zip(take(apart, 7), take(packed, 7), strict=True):
        assert unpack(one) == unpack(other)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(2, 13), min_size=1, max_size=30), st.integers(1, 5), st.booleans())
def test_evaluation_is_one_pass_in_order(lengths: list[int], batch_size: int, packing: bool):
    examples = make(lengths)
    batches = evaluation_batches(examples, batch_size=batch_size, sequence_length=14, packing=packing)
    expected = {example.index: (example.tokens.tolist(), example.weights[1:].tolist()) for example in examples}
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 14)}
    found: dict[int, Any] = {}
    for batch in batches:
        part = unpack(batch)
        assert not part.keys() & found.keys()
        found |= part
    assert found == expected
    if not packing:
        assert list(found) == sorted(found)
        assert len(batches) == -(-len(lengths) // batch_size)
    assert_equal([batches[-1]], [batches[len(batches) - 1]])
    assert_equal(batches[:2], list(batches)[:2])
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_steps_of_part_of_an_epoch():
    examples = make([5] * 10)
    layout = {"batch_size": 2, "sequence_length": 8, "seed": 0, "packing": False}
    assert [steps_of_epochs(examples, epochs, **layout) for epochs in (0.01, 0.5, 1, 1.25, 3)] == [1, 3, 5, 7, 15]
    packed = {**layout, "packing": True}
    assert steps_of_epochs(examples, 1, **packed) == 3
    assert len(make_batch(examples, [[0, 1]], 8)["tokens"]) == 1


EQUAL = make([2] * 400)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 400),
    st.decimals("0.001", "3", places=3) | st.sampled_from([Decimal("1.1"), Decimal("0.07"), Decimal("1e-5")]),
    st.integers(1, 7),
)
@example(rows=10, written=Decimal("1.1"), batch_size=1)
@example(rows=100, written=Decimal("0.07"), batch_size=1)
def test_epochs_are_counted_as_they_are_written(rows: int, written: Decimal, batch_size: int):
    layout = {"batch_size": batch_size, "sequence_length": 1, "seed": 0, "packing": False}
    exact = math.ceil(Fraction(math.ceil(Fraction(written) * rows), batch_size))
    assert steps_of_epochs(EQUAL[:rows], float(written), **layout) == exact


def test_packed_epochs_are_counted_as_they_are_written():
    # Ten rows of two examples each.
    layout = {"batch_size": 1, "sequence_length": 8, "seed": 0, "packing": True}
    assert [steps_of_epochs(make([5] * 20), epochs, **layout) for epochs in (1.1, 0.3, 2.7, 2)] == [11, 3, 27, 20]
