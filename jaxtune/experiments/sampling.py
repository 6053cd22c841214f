"""Nested subsets of a training set: one order of its documents for each seed, of which a size takes the beginning.

What is drawn are documents (rows) unless single examples are asked for: an example that shares its document with
another tells less than one from a document of its own. Every sampling orders *all* documents, so the subset of a size
is contained in that of every larger size by construction, and all sizes end at the same full set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from jaxtune.config.data_section import ExplodeConfig
from jaxtune.data import Example
from jaxtune.data.pipeline import permutation
from jaxtune.errors import UserError, nearest
from jaxtune.evaluation.evaluator import documents

Sampling = Literal["random", "stratified", "balanced"]
Unit = Literal["documents", "examples"]

NO_GROUP = "(none)"
"""The group of documents that have none: those without any value."""

# How many documents, in random order, compete for each place. More of them bring the shares of a subset nearer to those
# that are wanted; fewer leave more to chance, and chance is what several seeds are to show.
_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class Documents:
    """A training set by its documents.

    Attributes:
      members: the places of each document's examples, ascending.
      names: the groups, sorted.
      present: which groups each document belongs to; every document belongs to at least one.
      example_groups: the group that each *example* asks for.
    """

    members: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    present: Bool[np.ndarray, "documents groups"]
    example_groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def examples(self, chosen: Sequence[int] | Int[np.ndarray, " n"]) -> list[int]:
        """The places of the examples of chosen documents, ascending."""
        return sorted(place for document in chosen for place in self.members[int(document)])


def group_field(explode: ExplodeConfig | None, group_by: str | None) -> str | None:
    """The field that tells an example's group: the one that is configured, else the exploded entry's key."""
    if group_by is not None:
        return group_by
    return None if explode is None else explode.key


def example_groups(examples: Sequence[Example], field: str | None, *, key: str) -> tuple[str, ...]:
    """Each example's group; all in one where nothing tells groups apart.

    Raises:
      UserError: an example has no such field.
    """
    if field is None:
        return (NO_GROUP,) * len(examples)
    for example in examples:
        if field not in example.fields:
            raise UserError(f"study.data_size.group_by: {key} has no field {field!r}{nearest(field, example.fields)}")
    return tuple(str(example.fields[field]) for example in examples)


def read_documents(
    examples: Sequence[Example], explode: ExplodeConfig | None, group_by: str | None, unit: Unit = "documents"
) -> Documents:
    """The documents of a training set and their groups; with the unit ``examples`` each is one by itself.

    A document belongs to the groups of its examples. A question that is exploded from a schema and whose answer is
    that the document gives no value does not count: every document would have every group.

    Raises:
      UserError: ``group_by`` is no field of the examples.
    """
    groups = example_groups(examples, group_field(explode, group_by), key="data.train")
    numbers = documents(examples, explode) if unit == "documents" else range(len(examples))
    members: list[list[int]] = [[] for _ in range(max(numbers) + 1)]
    having: list[set[str]] = [set() for _ in members]
    for place, (number, group) in enumerate(zip(numbers, groups, strict=True)):
        members[number].append(place)
        absent = group_by is None and explode is not None and examples[place].fields[explode.value] == explode.absent
        if not absent:
            having[number].add(group)
    every = [own or {NO_GROUP} for own in having]
    names = tuple(sorted(set().union(*every)))
    present = np.array([[name in own for name in names] for own in every], bool)
    return Documents(tuple(map(tuple, members)), names, present, groups)


def sampling_order(documents: Documents, sampling: Sampling, seed: int) -> Int[np.ndarray, " documents"]:
    """All documents in the order in which a growing training set takes them.

    - ``random``: every order is equally likely.
    - ``stratified``: each beginning holds every group in about its share of the whole set. Among the next few documents
      in random order the one is taken that brings the group counts nearest to these shares (the greedy form of herding,
      Welling 2009), so the counts stay within a document or two of the shares times the size instead of drifting
      like its square root.
    - ``balanced``: each beginning holds the groups as often as one another, for as long as there are documents: the
      next document is the first in random order that has the group counted least so far.

    Args:
      documents: what is ordered.
      sampling: one of the three.
      seed: of the random order.
    """
    shuffled = permutation(len(documents), f"data-size/{seed}")
    if sampling == "random":
        return shuffled
    present = documents.present[shuffled]
    places = _stratified(present) if sampling == "stratified" else _balanced(present)
    return shuffled[np.asarray(places, np.int64)]


def _stratified(present: Bool[np.ndarray, "n groups"]) -> list[int]:
    """Places in the order of taking: the best of the first few that are left, the first one on a tie.

    With c the counts so far, p the shares and x a candidate's groups, |c + x - k p|² is smallest where the sum of
    1 + 2 (c - k p) over the candidate's groups is.
    """
    shares = present.mean(axis=0)
    counts = np.zeros(present.shape[1])
    window = list(range(min(_CANDIDATES, len(present))))
    following = len(window)
    taken: list[int] = []
    while window:
        cost = present[window] @ (1.0 + 2.0 * (counts - (len(taken) + 1) * shares))
        place = window.pop(int(np.argmin(cost)))
        taken.append(place)
        counts += present[place]
        if following < len(present):
            window.append(following)
            following += 1
    return taken


def _balanced(present: Bool[np.ndarray, "n groups"]) -> list[int]:
    queues = [list(np.flatnonzero(column)[::-1]) for column in present.T]
    counts = np.zeros(present.shape[1])
    used = np.zeros(len(present), bool)
    taken: list[int] = []
    while len(taken) < len(present):
        for queue in queues:
            while queue and used[queue[-1]]:
                queue.pop()
        rarest = min((group for group, queue in enumerate(queues) if queue), key=lambda group: (counts[group], group))
        place = int(queues[rarest].pop())
        used[place] = True
        taken.append(place)
        counts += present[place]
    return taken


def geometric_sizes(total: int, points: int, smallest: int, unit: Unit = "documents") -> list[int]:
    """0, then ``points`` sizes from ``smallest`` to ``total`` in equal ratios, rounded; repeated ones are left out.

    Raises:
      UserError: ``smallest`` is above ``total``.
    """
    if smallest > total:
        raise UserError(f"study.data_size.smallest: {smallest} is above the {total} {unit} of data.train")
    return sorted({0, *(round(size) for size in np.geomspace(smallest, total, points)), total})


def chosen_sizes(
    given: Sequence[int | str] | None, total: int, points: int, smallest: int, unit: Unit = "documents"
) -> list[int]:
    """The sizes of a study, ascending: those given (``all`` is everything), or a geometric grid.

    Raises:
      UserError: a size is above the number of documents, or of examples.
    """
    if given is None:
        return geometric_sizes(total, points, smallest, unit)
    sizes = sorted({total if size == "all" else int(size) for size in given})
    if sizes[-1] > total:
        raise UserError(
            f"study.data_size.sizes: {sizes[-1]} is above the {total} {unit} of data.train; the largest size is "
            f"{total}, or all"
        )
    return sizes
