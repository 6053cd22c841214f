"""Bounds on counted costs: which configurations a study may try, known before any is trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.config.metrics import COSTS
from jaxtune.config.search_section import BoundConfig, SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.candidates import TakenPoints, untaken
from jaxtune.search.costs import DECIDING, Count
from jaxtune.search.objectives import SATISFIED, Violation, bounds_in_words, violation
from jaxtune.search.space import Coordinate, Dimension, Point, Space, canonical

# A finite space up to this size is looked at whole.
_LISTED = 5_000
# Values of a dimension that has more of them, and draws of a large space, that are looked at for the nearest that fits.
_VALUES, _DRAWS = 33, 300
# So many combinations of values that decide the costs are all tried.
_COMBINED = 1_100


class Allowance:
    """What bounds on counted costs leave of a space.

    Args:
      space: the searched space.
      where: bounds of counted costs, by their names.
      count: counts a configuration's costs.
      names: of the costs that are told of each trial; if None, those that have bounds.

    Raises:
      UserError: no configuration of the space satisfies the bounds; tells the one that comes nearest.
    """

    def __init__(
        self, space: Space, where: Mapping[str, BoundConfig], count: Count, names: Sequence[str] | None = None
    ):
        self.space, self.where = space, dict(where)
        self._count, self._names = count, tuple(where if names is None else names)
        self._known: dict[str, Mapping[str, float]] = {}
        self._idle: frozenset[str] = frozenset()
        self._deciding = self._find_deciding() if self._names else []
        self._idle = frozenset(space.keys) - {space.keys[index] for index in self._deciding}
        self._anchor = self._least() if self.where else None

    def costs(self, configuration: Mapping[str, Any]) -> Mapping[str, float]:
        """The counted costs of a configuration, each counted once."""
        part = {
            key: value
            for key, value in configuration.items()
            if key.split(".")[0] in DECIDING and key not in self._idle
        }
        key = canonical(part)
        if key not in self._known:
            self._known[key] = self._count(part)
        return self._known[key]

    def counted(self, configuration: Mapping[str, Any]) -> dict[str, float]:
        """The costs that the study names, of a configuration."""
        return {name: self.costs(configuration)[name] for name in self._names}

    def allows(self, point: Sequence[Coordinate]) -> bool:
        """Whether a point satisfies the bounds."""
        return self._violation(point) == SATISFIED

    def fitted(self, point: Point, taken: TakenPoints, *, seed: int, trial: int, spread: bool = False) -> Point:
        """The point itself where it is allowed, else one like it that is and that no trial has.

        It differs in one of the coordinates that decide the costs. Where none such fits, it is the nearest of a small
        space; in a large one it differs in all that decide the costs, which are then those of a configuration that is
        known to fit.

        Args:
          point: as proposed.
          taken: points of trials.
          seed: of the study.
          trial: that is to be proposed.
          spread: which of those that differ in one coordinate: any, drawn by seed and trial, so that a design goes on
            to fill what is left of the space; or else the nearest.

        Raises:
          ValueError: every configuration that is allowed has been tried.
        """
        if self.allows(point):
            return point

        def distance(other: Point) -> float:
            return self._distance(point, other)

        near = sorted(self._moved(point), key=distance)
        if spread:
            near = [near[index] for index in np.random.default_rng((seed, trial, 4)).permutation(len(near))]
        size = self.space.size
        if size is not None and size <= _LISTED:
            far = sorted(self.space.points(), key=distance)
        else:
            assert self._anchor is not None, "without bounds every point is allowed"
            anchor = [self._anchor[index] for index in self._deciding]
            draws = untaken(self.space, taken, seed=seed, trial=trial, count=_DRAWS)
            far = [self._with(other, anchor) for other in (point, *draws)]
        for other in (*near, *far):
            if tuple(other) not in taken and self.allows(other):
                return other
        raise ValueError(f"all configurations with {bounds_in_words(self.where)} have been tried")

    def check_room(self, trials: int, points: Mapping[int, Point | None]) -> None:
        """Refuses more trials than a small space has configurations within the bounds.

        Args:
          trials: how many there are to be.
          points: of the trials that there are, trial 0 included; None for one outside the space.

        Raises:
          UserError: there are not enough configurations that no trial has.
        """
        size, wanted = self.space.size, trials - len(points)
        if not self.where or size is None or size > _LISTED or wanted <= 0:
            return
        taken = {tuple(point) for point in points.values() if point is not None}
        free = sum(tuple(point) not in taken and self.allows(point) for point in self.space.points())
        if wanted > free:
            raise UserError(
                f"search.trials is {trials}, but search.space holds only {free} further configurations with "
                f"{bounds_in_words(self.where)}; lower search.trials to {len(points) + free}, or widen the space"
            )

    def _violation(self, point: Sequence[Coordinate]) -> Violation:
        if not self.where:
            return SATISFIED
        return violation(self.where, self.costs(self.space.configuration(point)))

    def _find_deciding(self) -> list[int]:
        """The dimensions along which the costs change, from the study's own configuration."""
        found = []
        for index, dimension in enumerate(self.space.dimensions):
            first, *others = [self.costs(self.space.alone(dimension.key, value)) for value in dimension.samples()]
            if any(cost != first for cost in others):
                found.append(index)
        return found

    def _corners(self) -> list[Point]:
        return [
            self.space.snap([one.low if low else one.high for one in self.space.dimensions]) for low in (True, False)
        ]

    def _moved(self, point: Point) -> Iterator[Point]:
        """Points that differ in one of the coordinates that decide the costs."""
        for index in self._deciding:
            for coordinate in _values(self.space.dimensions[index]):
                yield self.space.snap([*point[:index], coordinate, *point[index + 1 :]])

    def _distance(self, one: Sequence[Coordinate], other: Sequence[Coordinate]) -> float:
        parts = [
            abs(_unit(dimension, a) - _unit(dimension, b)) if dimension.kind != "choice" else float(a != b)
            for dimension, a, b in zip(self.space.dimensions, one, other, strict=True)
        ]
        return math.hypot(*parts)

    def _least(self) -> Point:
        """The point that violates the bounds least: one that satisfies them.

        All combinations of the coordinates that decide are tried where they are few. Else one after the other is set
        to its best value, for as long as that helps, from two corners of the space.
        """
        low, high = self._corners()
        values = [_values(self.space.dimensions[index]) for index in self._deciding]
        if math.prod(map(len, values)) <= _COMBINED:
            found = [self._with(low, chosen) for chosen in itertools.product(*values)]
        else:
            found = [self._descend(low), self._descend(high)]
        fits = next(filter(self.allows, found), None)
        if fits is None:
            raise UserError(self._refusal(min(found, key=self._violation)))
        return fits

    def _with(self, point: Sequence[Coordinate], chosen: Sequence[Coordinate]) -> Point:
        """A point with other coordinates where they decide the costs."""
        moved = dict(zip(self._deciding, chosen, strict=True))
        return self.space.snap([moved.get(index, each) for index, each in enumerate(point)])

    def _descend(self, point: Point) -> Point:
        while not self.allows(point):
            moved = min(self._moved(point), key=self._violation)
            if self._violation(moved) >= self._violation(point):
                break
            point = moved
        return point

    def _refusal(self, point: Point) -> str:
        configuration = self.space.configuration(point)
        costs = self.costs(configuration)
        violated = {name: bound for name, bound in self.where.items() if violation({name: bound}, costs) != SATISFIED}
        deciding = [self.space.keys[index] for index in self._deciding]
        named = [f"{key}={configuration[key]}" for key in deciding if key in configuration]
        at = ", ".join(named) or "which no searched key decides"
        has = ", ".join(f"{name} {costs[name]:,.0f}" for name in violated)
        return (
            f"search.where.{next(iter(violated))}: no configuration of search.space has {bounds_in_words(violated)}; "
            f"the nearest has {has} ({at}); change the bound, or widen the space"
        )


def allowance(space: Space, search: SearchConfig, count: Count | None) -> Allowance:
    """What the bounds of a search on counted costs leave of its space.

    Raises:
      UserError: as :class:`Allowance`.
      ValueError: the search names a counted cost and there is nothing that counts it.
    """
    if count is None:
        if search.counted:
            raise ValueError(f"{search.counted[0]} is a counted cost: give costs, which counts it")
        count = _nothing
    bounds = {name: bound for name, bound in search.where.items() if name in COSTS}
    return Allowance(space, bounds, count, search.counted)


def _nothing(configuration: Mapping[str, Any]) -> Mapping[str, float]:
    return {}


def _values(dimension: Dimension) -> list[Coordinate]:
    """Coordinates of a dimension, its ends among them: all, where it has few."""
    low, high = dimension.low, dimension.high
    shares = [place / (_VALUES - 1) for place in range(_VALUES)]
    if dimension.continuous:
        if dimension.kind == "log_uniform":
            return [float(low) * (float(high) / float(low)) ** share for share in shares]
        return [float(low) + share * (float(high) - float(low)) for share in shares]
    if (dimension.size or 0) <= _VALUES:
        return list(range(int(low), int(high) + 1))
    return sorted({round(int(low) + share * (int(high) - int(low))) for share in shares})


def _unit(dimension: Dimension, coordinate: Coordinate) -> float:
    """A coordinate in [0, 1]."""
    low, high = float(dimension.low), float(dimension.high)
    if dimension.kind == "log_uniform":
        return math.log(float(coordinate) / low) / math.log(high / low)
    return (float(coordinate) - low) / (high - low)
