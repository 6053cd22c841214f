"""The searched keys: from the configuration to coordinates that scikit-optimize understands, and back.

A *point* is a list of coordinates, one per searched key in the order of the YAML file; a *configuration* is what a
trial is started with, a mapping from dotted keys to plain Python values. Coordinates are floats (``log_uniform``,
``uniform``), integers (``integer``), exponents (``power_of_two``) or indices (``choice``), so that any YAML value can
be a choice.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxtune.config.aliases import our_keys
from jaxtune.config.search_section import Confidence, DimensionConfig
from jaxtune.errors import UserError, nearest
from jaxtune.search.conditions import Conditions

if TYPE_CHECKING:
    import skopt.space

Coordinate = float | int
Point = list[Coordinate]

# Floats keep so many digits, so that people can retype them; more in a range that would hold fewer values than this.
_SIGNIFICANT_DIGITS, _MOST_DIGITS = 6, 17
_FEWEST_VALUES = 1000


def canonical(value: Any) -> str:
    """A text that is equal for equal YAML values: 1 and 1.0 are the same, True and 1 are not, tuples are lists."""

    def normalise(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {str(key): normalise(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [normalise(item) for item in part]
        if isinstance(part, int) and not isinstance(part, bool) and abs(part) < 2**53:
            return float(part)
        return part

    return json.dumps(normalise(value), sort_keys=True)


@dataclass(frozen=True)
class Dimension:
    """One searched key.

    Attributes:
      key: dotted configuration key.
      kind: ``log_uniform``, ``uniform``, ``integer``, ``power_of_two`` or ``choice``.
      low: smallest coordinate.
      high: largest coordinate (included).
      choices: the values that a ``choice`` indexes; empty for the other kinds.
      prior: the coordinate that is likely best (:mod:`jaxtune.search.prior`); None where all are alike.
      confidence: how sure that is: ``low``, ``medium`` or ``high``.
    """

    key: str
    kind: str
    low: Coordinate
    high: Coordinate
    choices: tuple[Any, ...] = ()
    prior: Coordinate | None = None
    confidence: Confidence = "medium"

    @property
    def continuous(self) -> bool:
        """Whether coordinates are floats."""
        return self.kind in ("log_uniform", "uniform")

    @property
    def digits(self) -> int:
        """Significant digits of the values of a continuous dimension."""
        magnitude = math.floor(math.log10(max(abs(self.low), abs(self.high)))) + 1
        needed = math.ceil(math.log10(_FEWEST_VALUES) + magnitude - math.log10(self.high - self.low))
        return min(max(needed, _SIGNIFICANT_DIGITS), _MOST_DIGITS)

    @property
    def size(self) -> int | None:
        """The number of values; None for a continuous dimension."""
        return None if self.continuous else int(self.high - self.low) + 1

    def decode(self, coordinate: Any) -> Any:
        """The plain Python value of a coordinate; floats are rounded, so that people can retype them."""
        if self.continuous:
            return min(max(float(f"{float(coordinate):.{self.digits}g}"), float(self.low)), float(self.high))
        index = int(coordinate)
        if self.kind == "choice":
            return self.choices[index]
        return 2**index if self.kind == "power_of_two" else index

    def at(self, share: float) -> Coordinate:
        """The coordinate at a share, in [0, 1), of the way through; all values have equal parts."""
        if self.size is not None:
            return int(self.low) + int(share * self.size)
        if self.kind == "log_uniform":
            return float(self.low) * (float(self.high) / float(self.low)) ** share
        return float(self.low) + share * (float(self.high) - float(self.low))

    def describe(self) -> str:
        """What it holds, for people: ``log_uniform [1e-05, 0.01]``."""
        held = list(self.choices) if self.kind == "choice" else [self.decode(self.low), self.decode(self.high)]
        return f"{self.kind} {held}"

    def samples(self) -> tuple[Any, ...]:
        """Values that tell whether the dimension fits its key: all choices, or the bounds and one value inside.

        A value strictly between the bounds finds a continuous dimension over a key that takes whole numbers only.
        """
        if self.kind == "choice":
            return self.choices
        inside = (self.decode(self.low + (self.high - self.low) / math.pi),) if self.continuous else ()
        return (self.decode(self.low), *inside, self.decode(self.high))

    def encode(self, value: Any) -> Coordinate | None:
        """The coordinate of a value, or None where the value lies outside the dimension."""
        if self.kind == "choice":
            wanted = canonical(value)
            return next((i for i, choice in enumerate(self.choices) if canonical(choice) == wanted), None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        if self.continuous:
            coordinate: Coordinate = float(value)
        elif value != int(value):
            return None
        elif self.kind == "power_of_two":
            if value < 1 or int(value) & (int(value) - 1):
                return None
            coordinate = int(value).bit_length() - 1
        else:
            coordinate = int(value)
        return coordinate if self.low <= coordinate <= self.high else None

    def to_skopt(self) -> skopt.space.Dimension:
        """The dimension for scikit-optimize."""
        from skopt.space import Categorical, Integer, Real

        if self.kind == "choice":
            return Categorical(list(range(len(self.choices))), name=self.key)
        if self.continuous:
            prior = "log-uniform" if self.kind == "log_uniform" else "uniform"
            return Real(float(self.low), float(self.high), prior=prior, name=self.key)
        return Integer(int(self.low), int(self.high), name=self.key)


def _dimension(key: str, config: DimensionConfig) -> Dimension:
    dimension = _ranged(key, config)
    if config.prior is None:
        return dimension
    coordinate = dimension.encode(config.prior)
    if coordinate is None:
        raise UserError(f"search.space.{key}.prior: {config.prior!r} is outside {dimension.describe()}")
    return dataclasses.replace(dimension, prior=coordinate, confidence=config.confidence or "medium")


def _ranged(key: str, config: DimensionConfig) -> Dimension:
    """The dimension without what is believed of it."""
    where = f"search.space.{key}"
    value = getattr(config, config.kind)
    if config.kind == "choice":
        seen: set[str] = set()
        for choice in value:
            try:
                text = canonical(choice)
            except TypeError as error:
                raise UserError(
                    f"{where}: choice {choice!r} is not a plain value (number, text, list, mapping)"
                ) from error
            if text in seen:
                raise UserError(f"{where}: choice {choice!r} is listed twice")
            seen.add(text)
        if len(value) < 2:
            raise UserError(f"{where}: choice needs a list of at least two values")
        return Dimension(key, "choice", 0, len(value) - 1, tuple(value))
    low, high = value
    if config.kind in ("log_uniform", "uniform") and high - low < _FEWEST_VALUES * math.ulp(max(abs(low), abs(high))):
        raise UserError(
            f"{where}: {config.kind} [{low}, {high}] is too narrow for numbers between its ends; widen it, or leave "
            f"the key out and set it in the configuration"
        )
    if config.kind == "power_of_two":
        low, high = int(low).bit_length() - 1, int(high).bit_length() - 1
    return Dimension(key, config.kind, low, high)


class Space:
    """The space of a study.

    Args:
      space: ``search.space``: dotted key to what to try.
      known_keys: every dotted key that the configuration has; None skips the check.
      fixed: ``search.fixed``: searched keys that new trials do not vary any more, and their values.
      conditions: of keys that do not always apply, when they do (:mod:`jaxtune.search.conditions`).

    A fixed key keeps its dimension, so that what earlier trials told of it is still of use; new points are laid onto
    the slice by :meth:`snap`. A key that does not apply is no part of a configuration, and its coordinate is always the
    same one, its prior or the middle of its range: points that differ in nothing that applies are the same point.

    Raises:
      UserError: the space is empty, a key is not in the configuration, one key is inside another, choices repeat, a
        range is too narrow for numbers between its ends, or a fixed value is none that the key can take.
    """

    def __init__(
        self,
        space: Mapping[str, DimensionConfig],
        known_keys: Iterable[str] | None = None,
        fixed: Mapping[str, Any] | None = None,
        conditions: Conditions | None = None,
    ):
        if not space:
            raise UserError(
                "search.space is empty: name at least one key, such as optimizer.learning_rate, to search over"
            )
        if known_keys is not None:
            known = set(known_keys)
            for key in space:
                if key not in known:
                    meant = [name for name in our_keys(key.rpartition(".")[2]) if name in known] or sorted(known)
                    raise UserError(f"search.space: the configuration has no key {key!r}{nearest(key, meant)}")
        for key in space:
            parent = next((other for other in space if key.startswith(f"{other}.")), None)
            if parent is not None:
                raise UserError(f"search.space: {key!r} lies inside {parent!r}, which is searched as a whole; keep one")
        self.dimensions: tuple[Dimension, ...] = tuple(_dimension(key, config) for key, config in space.items())
        self._conditions = self._locate_conditions(conditions or {})
        self._idle: dict[int, Coordinate] = {}
        for index in self._conditions:
            one = self.dimensions[index]
            middle = one.at(0.5) if one.prior is None else one.prior
            self._idle[index] = one.decode(middle) if one.continuous else middle
        self._pins = self._locate_fixed(fixed or {})

    def _locate_conditions(self, conditions: Conditions) -> dict[int, dict[int, frozenset[Coordinate]]]:
        """By the index of a dimension, those that it depends on and their coordinates at which it applies."""
        located: dict[int, dict[int, frozenset[Coordinate]]] = {}
        for key, parents in conditions.items():
            each = located.setdefault(self.keys.index(key), {})
            for parent, values in parents.items():
                index = self.keys.index(parent)
                coordinates = (self.dimensions[index].encode(value) for value in values)
                each[index] = frozenset(one for one in coordinates if one is not None)
        return located

    def applies_at(self, index: int, point: Sequence[Any]) -> bool:
        """Whether a dimension, by its index, applies at a point."""
        return all(point[parent] in values for parent, values in self._conditions.get(index, {}).items())

    def applies(self, key: str, configuration: Mapping[str, Any]) -> bool:
        """Whether a searched key is one of a configuration's, by the values of those that it depends on."""
        for parent, values in self._conditions.get(self.keys.index(key), {}).items():
            one = self.dimensions[parent]
            if one.key in configuration and one.encode(configuration[one.key]) not in values:
                return False
        return True

    def alone(self, key: str, value: Any) -> dict[str, Any]:
        """Overrides that set one searched key, and those that it depends on so that it applies."""
        parents = self._conditions.get(self.keys.index(key), {})
        return {**{self.keys[one]: self.dimensions[one].decode(min(at)) for one, at in parents.items()}, key: value}

    def _locate_fixed(self, fixed: Mapping[str, Any]) -> dict[int, Coordinate]:
        """The coordinates of fixed keys, by the index of their dimension."""
        pins: dict[int, Coordinate] = {}
        for key, value in fixed.items():
            if key not in self.keys:
                raise UserError(f"search.fixed: {key!r} is not searched{nearest(key, self.keys)}")
            index = self.keys.index(key)
            coordinate = self.dimensions[index].encode(value)
            if coordinate is None:
                raise UserError(
                    f"search.fixed.{key}: {value!r} is outside search.space.{key}, {self.dimensions[index].describe()}"
                )
            pins[index] = self.dimensions[index].decode(coordinate) if self.dimensions[index].continuous else coordinate
        if len(pins) == len(self.dimensions):
            raise UserError("search.fixed fixes every searched key; leave at least one to search over")
        return pins

    @property
    def keys(self) -> tuple[str, ...]:
        """The searched keys in order."""
        return tuple(dimension.key for dimension in self.dimensions)

    @property
    def fixed(self) -> dict[str, Any]:
        """The fixed keys and their values."""
        return {self.keys[index]: self.dimensions[index].decode(pin) for index, pin in self._pins.items()}

    @property
    def size(self) -> int | None:
        """The number of configurations that can be proposed; None where a dimension that is not fixed is continuous."""
        sizes = [dimension.size for index, dimension in enumerate(self.dimensions) if index not in self._pins]
        whole = [size for size in sizes if size is not None]
        if len(whole) < len(sizes):
            return None
        if not self._conditions:
            return math.prod(whole)
        deciding = sorted({parent for parents in self._conditions.values() for parent in parents})
        total = 0
        for chosen in itertools.product(*(self._coordinates(index) for index in deciding)):
            at = dict(zip(deciding, chosen, strict=True))
            point = [at.get(index, one.low) for index, one in enumerate(self.dimensions)]
            free = [index for index in range(len(point)) if index not in at and self.applies_at(index, point)]
            total += math.prod(len(self._coordinates(index)) for index in free)
        return total

    def _coordinates(self, index: int) -> Sequence[Coordinate]:
        """Those of a dimension that can be proposed; it is not continuous, or it is fixed."""
        dimension = self.dimensions[index]
        return [self._pins[index]] if index in self._pins else range(int(dimension.low), int(dimension.high) + 1)

    def points(self) -> Iterator[Point]:
        """Every point that can be proposed.

        Raises:
          ValueError: a dimension that is not fixed is continuous.
        """
        if self.size is None:
            raise ValueError("a space with a continuous dimension cannot be listed")
        points = (list(point) for point in itertools.product(*map(self._coordinates, range(len(self.dimensions)))))
        if not self._conditions:
            return points
        return (list(point) for point in dict.fromkeys(tuple(self.snap(point)) for point in points))

    def configuration(self, point: Sequence[Any]) -> dict[str, Any]:
        """The configuration of a point, of the keys that apply; NumPy coordinates become plain Python values."""
        pairs = zip(self.dimensions, point, strict=True)
        return {dim.key: dim.decode(at) for index, (dim, at) in enumerate(pairs) if self.applies_at(index, point)}

    def point(self, configuration: Mapping[str, Any]) -> Point | None:
        """The point of a configuration.

        None where a key that applies is missing, one that does not is there, or a value lies outside the space.
        """
        point: Point = []
        for index, dimension in enumerate(self.dimensions):
            there = dimension.key in configuration
            if there != self.applies(dimension.key, configuration):
                return None
            coordinate = dimension.encode(configuration[dimension.key]) if there else self._idle[index]
            if coordinate is None:
                return None
            point.append(coordinate)
        return point

    def largest(self, key: str) -> float:
        """The largest number that a searched key can take, for arrays that must hold it.

        Raises:
          UserError: the key is a choice among values that are not all numbers.
        """
        dimension = next(dimension for dimension in self.dimensions if dimension.key == key)
        values = dimension.choices if dimension.kind == "choice" else (dimension.decode(dimension.high),)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"search.space.{key}: choice {value!r} is not a number")
        return float(max(values))

    def snap(self, point: Sequence[Any]) -> Point:
        """The nearest point that can be proposed: plain Python numbers, floats rounded, what does not vary put in.

        Its coordinates are exactly those of ``configuration(snap(point))``.
        """
        pairs = zip(self.dimensions, point, strict=True)
        snapped: Point = [dim.decode(coordinate) if dim.continuous else int(coordinate) for dim, coordinate in pairs]
        for index, pin in self._pins.items():
            snapped[index] = pin
        return self.settled(snapped)

    def settled(self, point: Sequence[Any]) -> Point:
        """The same point with what does not apply where it always is."""
        return [
            self._idle[index] if index in self._idle and not self.applies_at(index, point) else coordinate
            for index, coordinate in enumerate(point)
        ]

    def at(self, unit: Float[np.ndarray, " dimensions"]) -> Point:
        """The point that can be proposed at a place of the unit cube, each coordinate in [0, 1)."""
        return self.snap([dimension.at(float(share)) for dimension, share in zip(self.dimensions, unit, strict=True)])

    def without_priors(self) -> Space:
        """The space with all values alike."""
        plain = copy.copy(self)
        plain.dimensions = tuple(dataclasses.replace(dimension, prior=None) for dimension in self.dimensions)
        return plain

    def to_skopt(self) -> list[skopt.space.Dimension]:
        """The dimensions for scikit-optimize, in order."""
        return [dimension.to_skopt() for dimension in self.dimensions]
