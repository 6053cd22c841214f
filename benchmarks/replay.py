"""Recorded learning curves, and search strategies that spend a budget on them instead of training.

A strategy proposes points of the whole space; each is replaced by the nearest recorded configuration that the run has
not taken yet (Euclidean distance over the space's normalised coordinates), and the strategy is told that one's place
and scores. The rule is the same for all strategies and blunts them alike. A run that has taken the whole table ends.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import load_config
from jaxtune.search.methods import make_method
from jaxtune.search.observation import Observation
from jaxtune.search.space import Point, Space
from jaxtune.search.surrogate import Surrogate

CURVES = Path(__file__).parent / "curves"
# Trials of the initial design, as in a study.
INITIAL = 6


@dataclass(frozen=True)
class Table:
    """Finished trials of one task.

    Attributes:
      name: the task.
      space: their space.
      points: n points of it.
      unit: [n, columns], the points in normalised coordinates.
      steps: the s steps at which they were scored, the last one their full length.
      losses: [n, s] validation losses; NaN from where a trial diverged.
      errors: [n, s] their standard errors.
      test: [n] losses on the test split at the end.
      seconds: [n] of training.
    """

    name: str
    space: Space
    points: list[Point]
    unit: np.ndarray
    steps: tuple[int, ...]
    losses: np.ndarray
    errors: np.ndarray
    test: np.ndarray
    seconds: np.ndarray

    @property
    def final(self) -> np.ndarray:
        """[n] losses at the end; infinite where a trial diverged."""
        return np.where(np.isfinite(self.losses[:, -1]), self.losses[:, -1], np.inf)

    def column(self, share: float) -> int:
        """The first recorded step that is no earlier than a share of the full length."""
        return int(np.searchsorted(self.steps, round(share * self.steps[-1])))

    def share(self, column: int) -> float:
        """What reaching a recorded step costs, in full trainings."""
        return self.steps[column] / self.steps[-1]

    def observation(self, index: int, column: int, stopped: bool = False) -> Observation:
        """What a study would know of a trial scored at a recorded step."""
        loss = self.losses[index, column]
        score = float(loss) if math.isfinite(loss) else None
        step = self.steps[column] if stopped else None
        return Observation(self.points[index], score, float(self.errors[index, column]), step)


def read_table(task: str) -> Table:
    """The recorded curves of a task."""
    search = load_config(CURVES / f"{task}.yaml").search
    assert search is not None
    space = Space(search.space)
    with (CURVES / f"{task}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = tuple(int(name.removeprefix("loss_")) for name in rows[0] if name.startswith("loss_"))
    points = [space.snap([float(row[key]) for key in space.keys]) for row in _coordinates(space, rows)]

    def numbers(*names: str) -> np.ndarray:
        return np.array([[float(row[name] or "nan") for name in names] for row in rows])

    return Table(
        task,
        space,
        points,
        normalised(space, points),
        steps,
        numbers(*(f"loss_{step}" for step in steps)),
        numbers(*(f"standard_error_{step}" for step in steps)),
        numbers("test_loss")[:, 0],
        numbers("seconds")[:, 0],
    )


def _coordinates(space: Space, rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    return [{d.key: d.encode(float(row[d.key])) for d in space.dimensions} for row in rows]


def normalised(space: Space, points: Sequence[Point]) -> np.ndarray:
    """[n, columns] in the unit cube, as the Gaussian process sees points."""
    from skopt.space import Space as SkoptSpace
    from skopt.utils import normalize_dimensions

    transformed = SkoptSpace(normalize_dimensions(space.to_skopt()))
    return np.asarray(transformed.transform([list(point) for point in points]), float)


class Pool:
    """The configurations that a run has not taken yet."""

    def __init__(self, table: Table):
        self._table, self._free = table, np.ones(len(table.points), bool)

    def __len__(self) -> int:
        return int(self._free.sum())

    def take(self, point: Point) -> int:
        """The nearest free configuration, which is taken."""
        distance = ((self._table.unit - normalised(self._table.space, [point])) ** 2).sum(1)
        index = int(np.argmin(np.where(self._free, distance, np.inf)))
        self._free[index] = False
        return index


# For each budget (in full trainings) the trial that a strategy ends with; None where none was finished.
Winners = dict[float, int | None]
Strategy = Callable[[Table, int, Sequence[float]], Winners]


def best_of(table: Table, finished: Sequence[int]) -> int | None:
    """The trial of lowest final validation loss; None without a sound one."""
    sound = [index for index in finished if math.isfinite(table.final[index])]
    return min(sound, key=lambda index: table.final[index]) if sound else None


def winners(table: Table, ends: Sequence[tuple[float, int]], budgets: Sequence[float]) -> Winners:
    """Winners of a run that finishes trials one after another: (cost so far, trial)."""
    return {budget: best_of(table, [index for cost, index in ends if cost <= budget + 1e-9]) for budget in budgets}


def full(method: str) -> Strategy:
    """Every trial of one of our methods is trained to its end; the method knows all earlier ones."""

    def run(table: Table, seed: int, budgets: Sequence[float]) -> Winners:
        proposer, pool = make_method(method, table.space, seed=seed, initial=INITIAL), Pool(table)
        taken: list[int] = []
        while len(taken) + 1 <= max(budgets) and len(pool):
            told = [table.observation(index, -1) for index in taken]
            taken.append(pool.take(_point(table, proposer.propose(len(taken) + 1, told, []).configuration)))
        return winners(table, [(1.0 + at, index) for at, index in enumerate(taken)], budgets)

    return run


def _point(table: Table, configuration: Mapping[str, Any]) -> Point:
    point = table.space.point(configuration)
    assert point is not None
    return point


@dataclass(frozen=True)
class Fractional:
    """A study: trials are scored at a fraction of their steps and the most promising ones finished.

    As in a study, a proposal does not know the trial before it, which trains meanwhile and is pending.

    Attributes:
      method: ``search.method``.
      fraction: of the full length, at which trials are scored.
      finishing: the share of the budget that goes into finishing trials; it decides how many are promoted.
      ladder: earlier fractions: a trial is first scored at the lowest one, and the better half of each rung goes on to
        the next once all are scored there.
      taught_by: a finished study of another task, whose best trials take the place of the initial design.
    """

    method: str
    fraction: float = 0.2
    finishing: float = 0.5
    ladder: tuple[float, ...] = ()
    taught_by: Callable[[Table], Table] | None = None

    def __call__(self, table: Table, seed: int, budgets: Sequence[float]) -> Winners:
        """Runs the largest budget's proposals, which begin with those of the smaller ones."""
        column = table.column((*self.ladder, self.fraction)[0])
        proposer, pool = make_method(self.method, table.space, seed=seed, initial=INITIAL), Pool(table)
        start = [] if self.taught_by is None else _best_points(self.taught_by(table), INITIAL - 1)
        run = _Scored(column)
        while run.spent[-1] + table.share(column) <= max(self._early(table, b) for b in budgets) + 1e-9 and len(pool):
            trial = len(run.taken) + 1
            told = run.told(table, trial - 2)
            pending = [table.points[index] for index in run.taken[len(told) :]]
            if trial <= len(start):
                point = start[trial - 1]
            else:
                point = _point(table, proposer.propose(trial, told, pending).configuration)
            index = pool.take(point)
            run.add(table, index, self._train(table, proposer, trial, index, column, run.reports))
        return {budget: self._finish(table, seed, run, budget) for budget in budgets}

    def promote(self, table: Table, budget: float) -> int:
        """How many trials are finished."""
        return max(1, round(self.finishing * budget / (1 - table.share(table.column(self.fraction)))))

    def _early(self, table: Table, budget: float) -> float:
        """What is left of a budget for first scores, in full trainings."""
        left = budget - self.promote(table, budget) * (1 - table.share(table.column(self.fraction)))
        # Of what a trial costs on the ladder on average: all climb its first rung, half of them the next, and so on.
        rungs = [0.0, *(table.share(table.column(rung)) for rung in (*self.ladder, self.fraction))]
        climbs = [(high - low) / 2**at for at, (low, high) in enumerate(itertools.pairwise(rungs))]
        return left * climbs[0] / sum(climbs)

    def _train(self, table: Table, proposer: Any, trial: int, index: int, column: int, reports: dict) -> int:
        """The recorded step at which a trial ends: the fraction's, or that of a rung where the method stops it."""
        until = table.steps[column]
        reports[trial] = {}
        for rung in proposer.rungs(until):
            # A rung between two recorded steps is read at the later one.
            at = int(np.searchsorted(table.steps, rung))
            reports[trial][rung] = float(table.losses[index, at])
            if at < column and proposer.stops(trial, until, reports):
                return at
        return column

    def _finish(self, table: Table, seed: int, run: _Scored, budget: float) -> int | None:
        """Promotes among the trials that the budget allows, as a study does."""
        allowed = self._early(table, budget)
        count = sum(cost <= allowed + 1e-9 for cost in run.spent[1:])
        kept = list(range(count))
        for rung in (*self.ladder, self.fraction):
            column = table.column(rung)
            # Only the methods that stop trials leave some below the first rung.
            ends = [run.ends[at] if run.ends[at] < run.column else column for at in kept]
            told = [table.observation(run.taken[at], end, end < column) for at, end in zip(kept, ends, strict=True)]
            ranked = self._ranked(table, seed, told)
            left = self.promote(table, budget) if rung == self.fraction else math.ceil(len(kept) / 2)
            kept = [kept[at] for at in ranked[:left]]
        return best_of(table, [run.taken[at] for at in kept])

    def _ranked(self, table: Table, seed: int, told: list[Observation]) -> list[int]:
        """Positions of the trials that may go on, the most promising first."""
        there = [at for at, one in enumerate(told) if one.stopped is None]
        estimates = Surrogate(table.space, seed=seed, initial=INITIAL).promotion_estimates([told[at] for at in there])
        worth = dict(zip(there, [told[at].score for at in there] if estimates is None else estimates, strict=True))
        return sorted((at for at in there if told[at].score is not None), key=lambda at: (worth[at], told[at].score))


class _Scored:
    """Trials in the order of their numbers: which configuration, the step each ended at, and what was spent."""

    def __init__(self, column: int):
        self.column = column
        self.taken: list[int] = []
        self.ends: list[int] = []
        self.spent = [0.0]
        self.reports: dict[int, dict[int, float]] = {}

    def add(self, table: Table, index: int, end: int) -> None:
        """One more trial."""
        self.taken.append(index)
        self.ends.append(end)
        self.spent.append(self.spent[-1] + _cost(table, index, end))

    def told(self, table: Table, count: int) -> list[Observation]:
        """The first ``count`` trials."""
        pairs = zip(self.taken[: max(count, 0)], self.ends[: max(count, 0)], strict=True)
        return [table.observation(index, end, end != self.column) for index, end in pairs]


def _best_points(table: Table, count: int) -> list[Point]:
    """The points of the best finished trials."""
    return [table.points[index] for index in np.argsort(table.final, kind="stable")[:count]]


def _cost(table: Table, index: int, column: int) -> float:
    """What training to a recorded step costs; a trial that diverges earlier is charged up to there."""
    diverged = np.flatnonzero(~np.isfinite(table.losses[index, : column + 1]))
    return table.share(int(diverged[0]) if diverged.size else column)
