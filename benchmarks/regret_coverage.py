"""How often the intervals of a regret cover the mean regret over designs, on landscapes where it is known.

    python benchmarks/regret_coverage.py --json benchmarks/results/regret_coverage.json
    python benchmarks/regret_coverage.py --bench ../shared/search_bench

A landscape is a set of configurations with their early and final scores: the recorded tables of ``benchmarks/curves``,
distributions with a known law, and the tables of a folder of ``.npz`` files (``losses``, six columns). Designs of some
size are drawn from it. The mean regret over many is what an interval from one of them should hold. Beside the interval
that the experiments give stands the percentile interval at the same confidence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from replay import read_table

from jaxtune.experiments.agreement import draw_trials, interval, regret, regret_interval

TABLES = ("attr_oamine", "slots_restaurant8k")
CONFIDENCE = 0.95
CONFIGURATIONS = 4000


def landscapes(bench: Path | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, early scores and final scores; infinite where a configuration diverged."""
    for task in TABLES:
        table = read_table(task)
        yield task, _finite(table.losses[:, table.column(0.2)]), table.final
    generator = np.random.default_rng(0)
    for correlation in (0.3, 0.7, 0.95):
        final, other = generator.normal(size=(2, CONFIGURATIONS))
        early = correlation * final + np.sqrt(1 - correlation**2) * other
        yield f"log-normal, correlation {correlation:g}", early, np.exp(final)
    for noise in (0.1, 0.5):
        final = 4 * generator.uniform(size=CONFIGURATIONS) ** 2
        yield f"quadratic bowl, noise {noise:g}", final + noise * generator.normal(size=CONFIGURATIONS), final
    for file in sorted(bench.glob("*.npz")) if bench else ():
        losses = np.load(file)["losses"]
        yield file.stem, _finite(losses[:, 2]), _finite(losses[:, -1])


def _finite(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(scores), scores, np.inf)


def coverage(early: np.ndarray, final: np.ndarray, *, size: int, k: int, designs: int) -> dict[str, Any]:
    """How often both kinds of interval cover, and how wide they are, over designs of one landscape."""
    generator = np.random.default_rng(1)
    every = np.argsort(generator.random((4000, len(early))), axis=1)[:, :size]
    known = regret(early[every], final[every], k)
    mean = float(known[np.isfinite(known)].mean())
    found: dict[str, list[tuple[bool, float]]] = {"percentile": [], "ours": []}
    for design in range(designs):
        chosen = generator.choice(len(early), size, replace=False)
        one, last = early[chosen], final[chosen]
        drawn = draw_trials(size, 2000, design)
        plain = interval(0.0, regret(one[drawn], last[drawn], k), CONFIDENCE)
        ours = regret_interval(one, last, k, samples=2000, confidence=CONFIDENCE, seed=design)
        for name, each in (("percentile", plain), ("ours", ours)):
            found[name].append((each.low <= mean <= each.high, each.high - each.low))
    return {
        "mean_regret": mean,
        **{
            name: {
                "coverage": float(np.mean([covered for covered, _ in each])),
                "width": float(np.median([width for _, width in each])),
            }
            for name, each in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, help="folder of further landscapes")
    parser.add_argument("--designs", type=int, default=200, help="drawn from each landscape")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 24], help="trials of a design")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    arguments = parser.parse_args()
    rows = []
    for name, early, final in landscapes(arguments.bench):
        for size in arguments.sizes:
            for k in (1, 5):
                figures = coverage(early, final, size=size, k=k, designs=arguments.designs)
                rows.append({"landscape": name, "trials": size, "finished": k, **figures})
                covered = {kind: figures[kind]["coverage"] for kind in ("percentile", "ours")}
                print(f"{name}, {size} trials, {k} finished: {figures['mean_regret']:.4f}, {covered}", flush=True)
    lowest = {kind: min(row[kind]["coverage"] for row in rows) for kind in ("percentile", "ours")}
    highest = {kind: max(row[kind]["coverage"] for row in rows) for kind in ("percentile", "ours")}
    print(f"lowest {lowest}, highest {highest}")
    if arguments.json:
        result = {"confidence": CONFIDENCE, "designs": arguments.designs, "lowest": lowest, "highest": highest}
        arguments.json.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
