"""What search settings are chosen on, and what the choice is confirmed on: tables of learning curves, and made ones.

A *landscape* is a task with its space; a run of a strategy on it is a list of trials that can be looked at at any share
of their steps. On a table a proposal becomes the nearest configuration that is left (benchmarks/replay.py); the
synthetic objective takes it as it is. Regret is scaled: 0 is the best, 1 a median random point that stays finite.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from replay import CURVES, Pool, Table, _cost, normalised, read_table

from jaxtune.config.search_section import DimensionConfig
from jaxtune.search.observation import Observation
from jaxtune.search.space import Point, Space

# The two tables that were there when the settings were chosen, and those that were recorded to confirm the choice.
DEVELOPMENT_TABLES = ("attr_oamine", "slots_restaurant8k")
CONFIRMATION_TABLES = ("banking77", "clinc150")
# Bias and noise of the early scores of the synthetic objective.
SYNTHETIC = ((1.0, 0.7), (2.0, 1.5))
# Tasks of the synthetic objective from this seed on are for confirmation alone.
FIRST_CONFIRMATION_SEED = 1000
_RANDOM_POINTS = 4096


class Trials(Protocol):
    """The trials of one run, numbered as they were added."""

    points: list[Point]

    @property
    def exhausted(self) -> bool:
        """Whether there is no configuration left."""
        ...

    def add(self, point: Point) -> None:
        """One more trial, at a proposed point or the nearest one there is."""
        ...

    def observation(self, trial: int, share: float) -> Observation:
        """What a study would know of a trial scored at a share of its steps."""
        ...

    def cost(self, trial: int, share: float) -> float:
        """What training a trial to a share of its steps costs, in full trainings."""
        ...

    def final(self, trial: int) -> float:
        """The score at the end, by which a search chooses; infinite where it diverged."""
        ...

    def regret(self, trial: int | None) -> dict[str, float]:
        """Scaled regret by split; that of the worst configuration where there is no trial."""
        ...


@dataclass(frozen=True)
class Landscape:
    """A task to search on.

    Attributes:
      name: of the task.
      family: of the landscapes that are of one kind.
      space: that is searched.
      begin: starts a run; given its seed, which is that of the task too where tasks are made.
    """

    name: str
    family: str
    space: Space
    begin: Callable[[int], Trials]


class RecordedTrials:
    """Rows of a table."""

    def __init__(self, table: Table):
        self._table, self._pool = table, Pool(table)
        self._rows: list[int] = []
        self.points: list[Point] = []

    @property
    def exhausted(self) -> bool:
        """Whether all rows are taken."""
        return not len(self._pool)

    def add(self, point: Point) -> None:
        """Takes the nearest row."""
        self._rows.append(self._pool.take(point))
        self.points.append(self._table.points[self._rows[-1]])

    def observation(self, trial: int, share: float) -> Observation:
        """The recorded loss."""
        return self._table.observation(self._rows[trial], self._table.column(share))

    def cost(self, trial: int, share: float) -> float:
        """Up to where it diverged, if it did."""
        return _cost(self._table, self._rows[trial], self._table.column(share))

    def final(self, trial: int) -> float:
        """The last validation loss."""
        return float(self._table.final[self._rows[trial]])

    def regret(self, trial: int | None) -> dict[str, float]:
        """On the validation split, and on the test split where there is one."""
        table, row = self._table, None if trial is None else self._rows[trial]
        sound = np.isfinite(table.final)
        splits = {"validation": table.final, "test": np.where(sound, table.test, np.inf)}
        return {split: _scaled(losses, row) for split, losses in splits.items() if np.isfinite(losses).any()}


def _scaled(losses: np.ndarray, row: int | None) -> float:
    finite = losses[np.isfinite(losses)]
    loss = finite.max() if row is None or not math.isfinite(losses[row]) else losses[row]
    return float((loss - finite.min()) / (np.median(finite) - finite.min()))


def recorded(name: str, family: str, table: Table) -> Landscape:
    """The landscape of a table."""
    return Landscape(name, family, table.space, lambda seed: RecordedTrials(table))


def read_mlp(path: Path) -> Table:
    """A table of ``search_bench``: curves of adapters on a small network, by place in the unit cube."""
    names = ("learning_rate", "warmup", "weight_decay", "rank", "alpha", "dropout")
    space = Space({name: DimensionConfig(uniform=(0.0, 1.0)) for name in names})
    with np.load(path) as arrays:
        points = [space.snap(row) for row in arrays["unit"].tolist()]
        losses, errors, test = (np.asarray(arrays[key], float) for key in ("losses", "errors", "test"))
    steps = (5, 10, 20, 40, 70, 100)
    seconds = np.ones(len(points))
    return Table(path.stem, space, points, normalised(space, points), steps, losses, errors, test, seconds)


def read_study(directory: Path) -> Table:
    """The trials of a finished ``jaxtune study early-score`` that is scored by loss, from its summary and journal."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    if summary.get("study") != "early-score" or summary["objective"]["name"] != "loss":
        raise SystemExit(f"{directory}: a table is made of a study early-score by loss")
    first = json.loads((directory / "trials.jsonl").read_text(encoding="utf-8").splitlines()[0])
    space = Space({key: DimensionConfig(**value) for key, value in first["space"].items()})
    trials = [(point, one) for one in summary["trials"] if (point := space.point(one["configuration"])) is not None]
    points = [space.snap(point) for point, _ in trials]
    shares = [f"{share:g}" for share in summary["fractions"]]
    scores = [[one["scores"].get(share) for share in shares] for _, one in trials]
    losses = np.array(scores, float)
    error = np.array([one["standard_error"] for _, one in trials], float)
    errors, none = np.repeat(error[:, None], len(shares), 1), np.full(len(points), np.nan)
    steps = tuple(max((one["steps"] for _, one in trials), key=len))
    return Table(directory.name, space, points, normalised(space, points), steps, losses, errors, none, none)


SYNTHETIC_SPACE = Space(
    {
        "learning_rate": DimensionConfig(log_uniform=(1e-5, 1e-2)),
        "rank": DimensionConfig(power_of_two=(2, 128)),
        "ratio": DimensionConfig(log_uniform=(0.25, 8.0)),
        "warmup": DimensionConfig(uniform=(0.0, 0.3)),
        "weight_decay": DimensionConfig(log_uniform=(1e-4, 10**-0.5)),
        "dropout": DimensionConfig(uniform=(0.0, 0.3)),
    }
)


class SyntheticTrials:
    """Trials of the synthetic objective of ``search_bench``; the noise of a score follows from run, trial and share."""

    def __init__(self, module: Any, seed: int, bias: float, noise: float):
        self._task, self._seed, self._noise = module.Task(seed, bias, noise), seed, noise
        self._best, self._median, self._worst = _range(module, seed, bias, noise)
        self._rows: list[np.ndarray] = []
        self.points: list[Point] = []

    @property
    def exhausted(self) -> bool:
        """Never: it is continuous."""
        return False

    def add(self, point: Point) -> None:
        """Takes the point as it is."""
        rate, rank, ratio, warmup, decay, dropout = point
        self._rows.append(np.array([math.log10(rate), rank, math.log2(ratio), warmup, math.log10(decay), dropout]))
        self.points.append(point)

    def _observed(self, trial: int, share: float) -> float:
        state = np.random.SeedSequence((self._seed, trial, round(1000 * share))).generate_state(1)[0]
        return float(self._task.observe(self._rows[trial], share, np.random.RandomState(state))[0])

    def observation(self, trial: int, share: float) -> Observation:
        """The noisy loss."""
        loss, error = self._observed(trial, share), self._noise * (0.006 + 0.018 * (1 - share))
        return Observation(self.points[trial], loss if math.isfinite(loss) else None, error)

    def cost(self, trial: int, share: float) -> float:
        """Up to where it diverges, if it does."""
        row = self._rows[trial]
        return min(share, float(self._task.tdiv(row))) if self._task.diverges(row)[0] else share

    def final(self, trial: int) -> float:
        """The noisy loss at the end."""
        loss = self._observed(trial, 1.0)
        return loss if math.isfinite(loss) else math.inf

    def regret(self, trial: int | None) -> dict[str, float]:
        """Of the loss without noise; there is no other split."""
        loss = self._worst if trial is None else float(self._task.true(self._rows[trial])[0])
        loss = loss if math.isfinite(loss) else self._worst
        return {"validation": (loss - self._best) / (self._median - self._best)}


@functools.lru_cache(maxsize=64)
def _range(module: Any, seed: int, bias: float, noise: float) -> tuple[float, float, float]:
    """Best, median and worst loss of a task."""
    task = module.Task(seed, bias, noise)
    losses = task.true(module.rnd(_RANDOM_POINTS, np.random.RandomState(0)))
    return float(module.optimum(task)[1]), float(np.nanmedian(losses)), float(np.nanmax(losses))


def synthetic(path: Path, bias: float, noise: float) -> Landscape:
    """Tasks of the synthetic objective in a file, one a seed."""
    module = _module(path)
    name = f"synthetic, bias {bias:g}, noise {noise:g}"
    return Landscape(name, "synthetic", SYNTHETIC_SPACE, lambda seed: SyntheticTrials(module, seed, bias, noise))


@functools.cache
def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("search_bench_synthetic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def development(bench: Path) -> list[Landscape]:
    """What settings may be chosen on: the old tables, and ``search_bench`` where it is."""
    found = [recorded(name, "recorded", read_table(name)) for name in DEVELOPMENT_TABLES]
    found += [recorded(path.stem, "mlp", read_mlp(path)) for path in sorted(bench.glob("mlp_*.npz"))]
    return found + _synthetic(bench)


def confirmation(bench: Path, studies: list[Path]) -> list[Landscape]:
    """What the choice is confirmed on: tables and studies recorded for it, and tasks of the synthetic objective."""
    names = [name for name in CONFIRMATION_TABLES if (CURVES / f"{name}.csv").exists()]
    found = [recorded(name, "recorded", read_table(name)) for name in names]
    found += [recorded(path.name, "study", read_study(path)) for path in studies]
    return found + _synthetic(bench)


def _synthetic(bench: Path) -> list[Landscape]:
    path = bench / "synthetic.py"
    return [synthetic(path, *setting) for setting in SYNTHETIC] if path.exists() else []
