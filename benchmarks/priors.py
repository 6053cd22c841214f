"""What a prior is worth to a search: good and misleading ones on landscapes that are at hand.

Landscapes are those of benchmarks/landscapes.py that lie in a folder outside this repository: tables of learning curves
of small networks, and a synthetic objective. All six keys get a prior of medium confidence, drawn anew for each run,
from 512 configurations that fill the space:

- good: the best of them, with normal noise of a tenth of the range on each key,
- misleading: one of their worst tenth, those that diverge among them.

Half of a budget (in full trainings) scores trials at 20 %, half finishes the best straight away. Regret is scaled: 0 is
the best configuration, 1 the median one (3 at most here, so that no single run decides a mean). Each prior is compared
with none, run by run of the same landscape and seed; intervals are 95 % bootstraps over landscapes, whose runs belong
together.

    python benchmarks/priors.py ../search_bench --methods gp random --json > first.json
    python benchmarks/priors.py ../search_bench --methods thompson --add first.json --json > both.json
    python benchmarks/priors.py --add benchmarks/results/priors.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from budgeted import Ending, propose, winner
from common import machine
from landscapes import Landscape, Trials, development
from replay import INITIAL

from jaxtune.search.prior import Marginal
from jaxtune.search.space import Point, Space
from jaxtune.search.surrogate import Surrogate

METHODS = {"gp": "gp, ei", "thompson": "gp, thompson", "random": "random"}
FAMILIES = ("mlp", "synthetic")
PRIORS = ("none", "good", "misleading")
NOISE = 0.1
BUDGETS, SEEDS, CONFIGURATIONS = (4, 8, 12), 2, 512
ENDING = Ending((1.0,), "mean")
WORST_REGRET = 3.0
PACKAGES = ("jaxtune", "numpy", "scipy", "scikit-optimize", "scikit-learn")
_DRAWS = 4000


@functools.cache
def ranked(landscape: Landscape, seed: int) -> list[Point]:
    """Configurations that fill the space, the best at the end of training first."""
    from scipy.stats import qmc

    trials: Trials = landscape.begin(seed)
    for unit in qmc.Sobol(len(landscape.space.dimensions), rng=0).random(CONFIGURATIONS):
        trials.add(landscape.space.at(unit))
    finals = [trials.final(trial) for trial in range(CONFIGURATIONS)]
    return [trials.points[at] for at in np.argsort(finals, kind="stable")]


def believing(space: Space, kind: str, best_first: Sequence[Point], seed: int) -> Space:
    """The space with the priors of a run."""
    if kind == "none":
        return space
    generator = np.random.default_rng((seed, 77))
    worst = len(best_first) // 10
    point = best_first[-int(generator.integers(1, worst + 1))] if kind == "misleading" else best_first[0]
    dimensions = []
    for dimension, coordinate in zip(space.dimensions, point, strict=True):
        share = float(Marginal(dimension).positions([coordinate])[0])
        if kind == "good":
            share += NOISE * generator.standard_normal()
        place = min(max(share, 0.0), float(np.nextafter(1.0, 0.0)))
        dimensions.append(dataclasses.replace(dimension, prior=dimension.at(place)))
    believed = copy.copy(space)
    believed.dimensions = tuple(dimensions)
    return believed


def run(landscape: Landscape, method: str, seed: int) -> list[float]:
    """Scaled regrets at each budget."""
    longest = max(ENDING.early(budget) for budget in BUDGETS)
    trials = propose(landscape, METHODS[method], seed, longest)
    surrogate, means = Surrogate(landscape.space, seed=seed, initial=INITIAL), {}
    won = [winner(trials, ENDING, budget, surrogate, means) for budget in BUDGETS]
    return [round(min(trials.regret(trial)["validation"], WORST_REGRET), 4) for trial in won]


def measure(landscapes: Sequence[Landscape], method: str) -> dict[str, list[list[float]]]:
    """Regrets by prior: of each run in the order of landscapes and seeds, at each budget."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in PRIORS}
    for landscape in landscapes:
        for seed in range(SEEDS):
            # A table is the same for all seeds.
            best_first = ranked(landscape, seed if landscape.family == "synthetic" else 0)
            for kind in PRIORS:
                space = believing(landscape.space, kind, best_first, seed)
                found[kind].append(run(dataclasses.replace(landscape, space=space), method, seed))
        print(f"{method}: {landscape.name}", file=sys.stderr, flush=True)
    return found


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of [landscapes, seeds], drawn by landscape."""
    means = differences.mean(axis=1)
    drawn = np.random.default_rng(0).integers(len(means), size=(_DRAWS, len(means)))
    low, high = np.percentile(means[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarize(regrets: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> dict[str, Any]:
    """By method, prior and budget: the mean regret, and its difference to no prior with the interval."""
    summary: dict[str, Any] = {}
    for method, by_kind in regrets.items():
        for kind, runs in by_kind.items():
            regret = np.array(runs)
            differences = (regret - np.array(by_kind["none"])).reshape(-1, SEEDS, len(BUDGETS))
            for at, budget in enumerate(BUDGETS):
                low, high = interval(differences[:, :, at])
                told = {"regret": float(regret[:, at].mean()), "difference": float(differences[:, :, at].mean())}
                summary.setdefault(method, {}).setdefault(kind, {})[str(budget)] = {**told, "low": low, "high": high}
    return summary


def text(summary: Mapping[str, Any]) -> str:
    """The table of the page."""
    lines = [f"| method, prior | {' | '.join(map(str, BUDGETS))} |", "|---" * (1 + len(BUDGETS)) + "|"]
    for method, by_kind in summary.items():
        for kind, cells in by_kind.items():
            compared = "" if kind == "none" else " ({difference:+.3f}, {low:+.3f} to {high:+.3f})"
            shown = [("{regret:.3f}" + compared).format(**cell) for cell in cells.values()]
            lines.append(f"| {METHODS[method]}; {kind} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, or shows what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of the landscapes; without it nothing is measured")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what proposes")
    parser.add_argument("--add", type=Path, help="a result to add to, or to show")
    parser.add_argument("--json", action="store_true", help="print the result for programs")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"regrets": {}, "cpu_seconds": {}}
    if arguments.add:
        result |= json.loads(arguments.add.read_text(encoding="utf-8"))
    if arguments.folder:
        landscapes = [one for one in development(arguments.folder) if one.family in FAMILIES]
        result |= {"landscapes": [one.name for one in landscapes], "seeds": SEEDS, "machine": machine(PACKAGES)}
        for method in arguments.methods:
            begin = time.process_time()
            result["regrets"][method] = measure(landscapes, method)
            result["cpu_seconds"][method] = round(time.process_time() - begin)
    result["summary"] = summarize(result["regrets"])
    print(json.dumps(result) if arguments.json else text(result["summary"]))


if __name__ == "__main__":
    main()
