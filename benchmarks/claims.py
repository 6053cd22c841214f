"""The page of the experiments' claims: what blocks B, C, R and D say, from their journals alone.

    python benchmarks/claims.py

It writes ``docs/experiments/smollm2/README.md`` and ``claims.json`` from ``docs/experiments/smollm2/journals``; a block
that has not ended is left out. The pages of A, E and F are written by their own commands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from comparisons import holm
from experiments.run_blocks import FINAL_SEEDS, FRACTION, JOURNALS, OUT, SEARCH_SEEDS, TASKS
from scipy import stats

from jaxtune.experiments.learning_curve import Measured
from jaxtune.experiments.output import markdown_table
from jaxtune.files import write_atomically
from jaxtune.search.journal import plain, read_journal
from jaxtune.search.trial import replay

ARMS = ("search", "random", "rate", "reference")
SAMPLES = 10_000


def summary_of(name: str) -> dict[str, Any] | None:
    """The summary of a job; None before its end."""
    path = JOURNALS / name / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def differences(task: str) -> list[dict[str, Any]] | None:
    """Exact match of the winner less that of each other arm, seeds and documents crossed; None before D ends."""
    summary = summary_of(f"D-{task}")
    if summary is None:
        return None
    folder = JOURNALS / f"D-{task}"
    history = replay(read_journal(folder)[1:], folder, folder / "trials.jsonl")
    named: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for entry in summary["trials"]:
        named[entry["name"]].append(history.trials[entry["trial"]].test)
    assert all(len(each) == len(FINAL_SEEDS) and None not in each for each in named.values()), "an arm diverged"
    first = named[ARMS[0]][0]
    weights = np.ones(len(first.per_example)) if first.weights is None else np.asarray(first.weights, np.float64)
    measured = Measured.of(
        range(len(ARMS)),
        np.stack([[np.asarray(outcome.per_example) * weights for outcome in named[arm]] for arm in ARMS]),
        weights,
        strata=first.strata,
        clusters=first.clusters,
        direction="max",
        limit=1.0,
    )
    means, drawn = measured.means(), measured.draws(SAMPLES)
    rows = []
    for place, arm in enumerate(ARMS[1:], start=1):
        each = drawn[:, 0] - drawn[:, place]
        low, high = np.quantile(each, [0.025, 0.975])
        # Two-sided, by how seldom the draws lie on the other side of no difference (Efron & Tibshirani 1993, 15.4).
        tail = min(float(np.mean(each <= 0)), float(np.mean(each >= 0)))
        rows.append(
            {
                "task": task,
                "against": arm,
                "search": float(means[0]),
                "other": float(means[place]),
                "difference": float(means[0] - means[place]),
                "low": float(low),
                "high": float(high),
                "p": max(2 * tail, 1 / SAMPLES),
            }
        )
    return rows


def ceiling(task: str) -> dict[str, Any] | None:
    """How far the order of one seed is that of another: what early scores cannot surpass; None before B ends."""
    again, design = summary_of(f"B-{task}"), OUT / f"early-score-{task}" / "summary.json"
    if again is None or not design.exists():
        return None
    first = json.loads(design.read_text(encoding="utf-8"))["trials"][: len(again["trials"])]
    found: dict[str, Any] = {"task": task, "trials": len(first)}
    for name in (f"{FRACTION:g}", "1"):
        place = again["fractions"].index(float(name))
        pairs = [
            (one["scores"][name], other["scores"][place]) for one, other in zip(first, again["trials"], strict=True)
        ]
        kept = np.array([pair for pair in pairs if None not in pair], np.float64)
        best = [set(np.argsort(kept[:, side], kind="stable")[:2].tolist()) for side in (0, 1)]
        found[name] = {
            "spearman": float(stats.spearmanr(kept[:, 0], kept[:, 1]).statistic),
            "best_2": len(best[0] & best[1]),
            "compared": len(kept),
        }
    return found


def searches(task: str) -> list[dict[str, Any]]:
    """What each search of block C came to, and the bounds of the space that its winner lies on."""
    rows = []
    for seed in SEARCH_SEEDS:
        summary = summary_of(f"C{seed}-{task}")
        if summary is None:
            continue
        best, baseline = summary["best"], summary["baseline"]
        folder = JOURNALS / f"C{seed}-{task}"
        space = read_journal(folder)[0]["space"]
        rows.append(
            {
                "task": task,
                "seed": seed,
                "winner": best["trial"],
                "final_score": best["final_score"],
                "reference": baseline["final_score"],
                "configuration": best["configuration"],
                "on_bounds": [key for key, value in best["configuration"].items() if on_bound(space.get(key), value)],
            }
        )
    return rows


def on_bound(dimension: Mapping[str, Any] | None, value: Any) -> bool:
    """Whether a value is one of the two ends of its range, within a hundredth of it."""
    if dimension is None or "choice" in dimension:
        return False
    kind = next(name for name in ("log_uniform", "uniform", "power_of_two", "integer") if name in dimension)
    low, high = map(float, dimension[kind])
    scale = math.log if kind in ("log_uniform", "power_of_two") else float
    part = (scale(float(value)) - scale(low)) / (scale(high) - scale(low))
    return min(part, 1 - part) < 0.01


def points(value: float) -> str:
    """A difference of shares, in points."""
    return f"{100 * value:+.1f}"


def page(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The page, as Markdown paragraphs."""
    said = [
        "# Experiments on SmolLM2-135M-Instruct",
        "What was asked, and how it is answered, was fixed beforehand in the [protocol](../protocol.md). Early scores "
        "(A), data size (E) and ablation (F) have pages of their own.",
    ]
    if found["differences"]:
        told = [
            {
                "task": row["task"],
                "against": row["against"],
                "exact match": f"{row['search']:.3f} against {row['other']:.3f}",
                "points": f"{points(row['difference'])} [{points(row['low'])}, {points(row['high'])}]",
                "p": f"{row['p']:.4f}",
                "told apart": "yes" if row["told_apart"] else "no",
            }
            for row in found["differences"]
        ]
        said += [
            "## D: the winner on the test set",
            markdown_table(told),
            "Three seeds and the test documents, both drawn with replacement; percentile intervals at 95 %. *Told "
            "apart*: by Holm's method over all rows.",
        ]
    if found["ceiling"]:
        told = [
            {
                "task": row["task"],
                "trials": str(row["trials"]),
                **{f"Spearman at {name}": f"{row[name]['spearman']:.2f}" for name in (f"{FRACTION:g}", "1")},
                "best 2 in common at the end": str(row["1"]["best_2"]),
            }
            for row in found["ceiling"]
        ]
        said += ["## B: one seed against another", markdown_table(told)]
    if found["searches"]:
        told = [
            {
                "task": row["task"],
                "seed": str(row["seed"]),
                "winner": f"{row['final_score']:.4f}",
                "reference": f"{row['reference']:.4f}",
                "on a bound": ", ".join(key.split(".")[-1] for key in row["on_bounds"]) or "none",
            }
            for row in found["searches"]
        ]
        said += ["## C: three searches", markdown_table(told), "Validation loss at the end."]
    return said


def main() -> None:
    rows = [row for task in TASKS for row in differences(task) or []]
    for row, told_apart in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["told_apart"] = told_apart
    found = {
        "differences": rows,
        "ceiling": [one for task in TASKS if (one := ceiling(task)) is not None],
        "searches": [row for task in TASKS for row in searches(task)],
    }
    write_atomically(OUT / "claims.json", json.dumps(plain(found), indent=2) + "\n")
    write_atomically(OUT / "README.md", "\n\n".join(page(found)) + "\n")


if __name__ == "__main__":
    main()
