from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.data_section import ExplodeConfig
from jaxtune.data import Example
from jaxtune.errors import UserError
from jaxtune.experiments.sampling import (
    NO_GROUP,
    Documents,
    chosen_sizes,
    geometric_sizes,
    read_documents,
    sampling_order,
)

SAMPLINGS = ("random", "stratified", "balanced")


def made(present: np.ndarray) -> Documents:
    """One example for each document."""
    names = tuple(f"g{index}" for index in range(present.shape[1]))
    members = tuple((place,) for place in range(len(present)))
    return Documents(members, names, present, ("g0",) * len(present))


def skewed(count: int, seed: int) -> np.ndarray:
    """Documents with six groups, the rarest in one of fifty; the last column stands for documents without any."""
    shares = np.array([0.8, 0.4, 0.2, 0.1, 0.05, 0.02])
    drawn = np.random.default_rng(seed).random((count, 6)) < shares
    return np.column_stack([drawn, ~drawn.any(axis=1)])


def example(index: int, **fields: str) -> Example:
    return Example(np.zeros(3, np.int32), np.ones(3, np.float32), index, 1, fields, " x")


@given(
    st.integers(1, 60).flatmap(
        lambda count: st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=count, max_size=count)
    ),
    st.sampled_from(SAMPLINGS),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_every_sampling_orders_all_documents_once(rows, sampling, seed):
    present = np.array(rows, bool)
    present = np.column_stack([present, ~present.any(axis=1)])
    order = sampling_order(made(present), sampling, seed)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert np.array_equal(order, sampling_order(made(present), sampling, seed))


@given(st.sampled_from(SAMPLINGS), st.integers(0, 1000), st.lists(st.integers(1, 80), min_size=2, max_size=5))
@settings(max_examples=50, deadline=None)
def test_examples_of_a_smaller_size_are_among_those_of_a_larger(sampling, seed, sizes):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, size=80)
    ends = np.cumsum(counts)
    members = tuple(tuple(range(end - count, end)) for end, count in zip(ends, counts, strict=True))
    documents = Documents(members, ("a", "b"), rng.random((80, 2)) < 0.5, ("a",) * int(ends[-1]))
    documents.present[~documents.present.any(axis=1), 0] = True
    order = sampling_order(documents, sampling, seed)
    subsets = [set(documents.examples(order[:size])) for size in sorted(sizes)]
    for smaller, larger in itertools.pairwise(subsets):
        assert smaller <= larger
    assert set(documents.examples(order)) == set(range(ends[-1]))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_seeds_draw_differently(sampling):
    documents = made(skewed(400, 0))
    first, second = (set(sampling_order(documents, sampling, seed)[:40].tolist()) for seed in (1, 2))
    # Two independent draws of 40 out of 400 share four documents on average.
    assert len(first & second) < 20


def deviation(sampling: str, size: int) -> float:
    """How far the group counts of a size are from their shares, root mean square over seeds and groups."""
    squares = []
    for seed in range(8):
        present = skewed(600, seed)
        order = sampling_order(made(present), sampling, seed)
        squares.append((present[order[:size]].sum(axis=0) - size * present.mean(axis=0)) ** 2)
    return float(np.sqrt(np.mean(squares)))


@pytest.mark.parametrize("size", [10, 40, 160])
def test_stratified_counts_follow_the_shares(size):
    assert deviation("stratified", size) < 0.6
    assert deviation("stratified", size) < 0.5 * deviation("random", size)


def test_balanced_takes_rare_groups_first():
    present = skewed(600, 0)
    rare = int(present[:, 5].sum())
    counts = present[sampling_order(made(present), "balanced", 0)[: 6 * rare]].sum(axis=0)
    assert counts[5] == rare, "all documents of the rarest group are among the first"
    assert counts.min() >= rare
    # With one group a document, balance is exact.
    single = np.eye(4, dtype=bool)[np.repeat(np.arange(4), [50, 30, 20, 10])]
    counts = single[sampling_order(made(single), "balanced", 3)[:40]].sum(axis=0)
    assert counts.tolist() == [10, 10, 10, 10]


def test_documents_are_rows_and_absent_answers_make_no_group():
    explode = ExplodeConfig(field="attributes", absent="n/a")
    entries = [
        ("a b", "x", "a"), ("a b", "y", "n/a"), ("c", "x", "n/a"), ("c", "y", "n/a"), ("d", "x", "d"), ("d", "y", "d"),
    ]  # fmt: skip
    examples = [
        example(index, text=text, attribute=attribute, value=value, kind=text[0])
        for index, (text, attribute, value) in enumerate(entries)
    ]
    read = read_documents(examples, explode, None)
    assert read.members == ((0, 1), (2, 3), (4, 5))
    assert read.names == (NO_GROUP, "x", "y")
    assert read.present.tolist() == [[False, True, False], [True, False, False], [False, True, True]]
    assert read.example_groups == ("x", "y") * 3
    assert read.examples([2, 0]) == [0, 1, 4, 5]
    assert read_documents(examples, explode, "kind").names == ("a", "c", "d")
    with pytest.raises(UserError, match=r"group_by.*'kid'.*did you mean 'kind'"):
        read_documents(examples, explode, "kid")
    whole = read_documents(examples, None, None)
    assert len(whole) == 6
    assert whole.names == (NO_GROUP,)


def test_sizes():
    assert geometric_sizes(1000, 3, 10) == [0, 10, 100, 1000]
    assert geometric_sizes(5, 8, 1)[-1] == 5
    assert geometric_sizes(3, 8, 1) == [0, 1, 2, 3]
    assert chosen_sizes(["all", 20, 0, 20], 64, 5, 10) == [0, 20, 64]
    with pytest.raises(UserError, match="65 is above the 64"):
        chosen_sizes([0, 65], 64, 5, 10)
    with pytest.raises(UserError, match="smallest"):
        geometric_sizes(5, 3, 10)


@pytest.mark.parametrize("seed", [21, 22])
def test_examples_keep_the_shares_of_present_and_absent(seed):
    """Drawn one by one, each beginning has within two questions the answers and the gaps that the whole set has."""
    explode = ExplodeConfig(field="attributes", absent="n/a")
    drawn = np.random.default_rng(0)
    examples = [
        example(number, text=str(number // 5), attribute=f"a{number % 5}", value="n/a" if drawn.random() < 0.7 else "x")
        for number in range(1000)
    ]
    units = read_documents(examples, explode, None, "examples")
    assert len(units) == 1000
    order = sampling_order(units, "stratified", seed)
    present = np.array([examples[place].fields["value"] != "n/a" for place in units.examples(range(1000))])
    for size in (50, 200, 650):
        chosen = units.examples(order[:size])
        assert len(chosen) == size
        assert abs(present[chosen].sum() - size * present.mean()) <= 2
