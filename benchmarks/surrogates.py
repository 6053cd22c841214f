"""Search strategies on recorded learning curves: what the best finished trial scores after a given budget.

Nothing is trained. The tables of benchmarks/curves (benchmarks/record_curves.py made them with jaxtune's trainer) are
replayed for many seeds of the search; a budget is counted in full trainings. How proposals become recorded
configurations is said in benchmarks/replay.py, how Optuna is run in benchmarks/optuna_rivals.py.

Regret is the final validation loss of the best trial that a strategy has finished, less that of the best recorded one;
the reference trial that a study finishes besides is left out for all. Bands are 95 % bootstrap intervals of the mean
over seeds; a star says that ``gp, fraction`` is ahead, seed by seed, with 95 % of the resamplings. One in twenty such
stars is luck, so the comparisons are also tested together (sign flips, Holm's correction): two stars are left by that.

    python benchmarks/surrogates.py                    # a table for each task
    python benchmarks/surrogates.py --json > benchmarks/results/surrogates.json
    python benchmarks/surrogates.py --figures docs/figures --from benchmarks/results/surrogates.json

In these tables ``gp`` proposes by expected improvement. What a search does by default was chosen on more landscapes
(benchmarks/landscapes.py, benchmarks/budgeted.py) and confirmed on others, which no choice has seen:

    python benchmarks/surrogates.py --development --seeds 10 --cells development.jsonl
    python benchmarks/surrogates.py --confirmation COMMIT --seeds 14 --cells confirmation.jsonl

From the repository's root; needs the extra ``optuna``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import landscape_study
import numpy as np
from common import machine
from comparisons import holm, sign_flips
from landscapes import DEVELOPMENT_TABLES
from optuna_rivals import tpe_with
from replay import Fractional, Strategy, Table, full, read_table

BUDGETS = (3, 4, 6, 8)
OURS = "gp, fraction"
STRATEGIES: dict[str, Strategy] = {
    "random, full": full("random"),
    "random, fraction": Fractional("random"),
    "TPE, full": tpe_with("none"),
    "TPE, median pruner": tpe_with("median"),
    "TPE, Hyperband": tpe_with("hyperband"),
    "gp, full": full("gp"),
    OURS: Fractional("gp"),
    "tpe, fraction": Fractional("tpe"),
    "hyperband, fraction": Fractional("hyperband"),
}


def _other(table: Table) -> Table:
    """The table of the next task, which stands for an earlier study on other data."""
    at = DEVELOPMENT_TABLES.index(table.name)
    return read_table(DEVELOPMENT_TABLES[(at + 1) % len(DEVELOPMENT_TABLES)])


# What goes beyond the method, each a change to ``gp, fraction``; measured on request.
EXTRAS: dict[str, Strategy] = {
    "gp, ladder 0.1": Fractional("gp", ladder=(0.1,)),
    "gp, fraction 0.1": Fractional("gp", fraction=0.1),
    "gp, fraction 0.4": Fractional("gp", fraction=0.4),
    "gp, finishing 1/3": Fractional("gp", finishing=1 / 3),
    "gp, finishing 2/3": Fractional("gp", finishing=2 / 3),
    "gp, transfer": Fractional("gp", taught_by=_other),
}
_RESAMPLES = 2_000


def regrets(table: Table, strategy: Strategy, seeds: Sequence[int], budgets: Sequence[float]) -> dict[str, np.ndarray]:
    """[seeds, budgets] regrets on the validation split (what a search can see) and on the test split.

    A run that has not finished a sound trial has the regret of the worst one.
    """
    sound = np.isfinite(table.final)
    worst = int(np.argmax(np.where(sound, table.final, -np.inf)))
    picked = []
    for seed in seeds:
        winners = strategy(table, seed, budgets)
        picked.append([worst if winners[budget] is None else winners[budget] for budget in budgets])
    index = np.array(picked)
    test = np.where(sound, table.test, np.inf)
    return {"validation": table.final[index] - table.final.min(), "test": table.test[index] - test.min()}


def interval(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over seeds."""
    means = generator.choice(values, (_RESAMPLES, len(values))).mean(1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def described(values: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means over seeds with their bands, for each budget; and how much is lost against ours (positive: ours leads)."""
    generator, row = np.random.default_rng(0), {}
    for split, prefix in (("validation", ""), ("test", "test_")):
        regret, behind = values[split], values[split] - ours[split]
        bands = [interval(column, generator) for column in regret.T]
        leads = [interval(column, generator) for column in behind.T]
        row |= {
            f"{prefix}mean": regret.mean(0).tolist(),
            f"{prefix}low": [low for low, _ in bands],
            f"{prefix}high": [high for _, high in bands],
            f"{prefix}behind_ours": behind.mean(0).tolist(),
            f"{prefix}behind_ours_low": [low for low, _ in leads],
            f"{prefix}behind_ours_high": [high for _, high in leads],
        }
    return row


def compare(result: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Tests all that ``ours`` is compared with together, and notes in each row which differences are left.

    The strategies and what goes beyond them are two families of hypotheses: the second was chosen after the first.

    Returns:
      For each family and split: the comparisons, those whose 95 % interval leaves zero out, and those left by Holm's
      correction at 5 %, with the number of them in which ours is ahead.
    """
    counts: dict[str, Any] = {}
    for family, names in (("strategies", STRATEGIES), ("extras", EXTRAS)):
        counts[family] = {}
        for split, prefix in (("validation", ""), ("test", "test_")):
            cells, differences = [], []
            for task, measured in tasks.items():
                ours = np.array(result["regrets"][task][result["ours"]][split])
                for name in (name for name in names if name in measured["strategies"] and name != result["ours"]):
                    differences.append(np.array(result["regrets"][task][name][split]) - ours)
                    measured["strategies"][name][f"{prefix}after_holm"] = [False] * len(result["budgets"])
                    cells += [(measured["strategies"][name], at) for at in range(len(result["budgets"]))]
            p_values = sign_flips(np.concatenate(differences, axis=1)) if cells else []
            for (row, at), left in zip(cells, holm(p_values), strict=True):
                row[f"{prefix}after_holm"][at] = left
            ahead = [row[f"{prefix}behind_ours_low"][at] > 0 for row, at in cells]
            behind = [row[f"{prefix}behind_ours_high"][at] < 0 for row, at in cells]
            left = [row[f"{prefix}after_holm"][at] for row, at in cells]
            counts[family][split] = {
                "comparisons": len(cells),
                "ahead": sum(ahead),
                "behind": sum(behind),
                "ahead_after_holm": sum(one and lead for one, lead in zip(left, ahead, strict=True)),
                "behind_after_holm": sum(one and lag for one, lag in zip(left, behind, strict=True)),
            }
    return counts


def facts(table: Table) -> dict[str, Any]:
    """What there is to find in a table, and how well early scores tell it."""
    from scipy.stats import spearmanr

    sound = np.isfinite(table.final)
    final = table.final[sound]
    at = {f"{table.share(c):g}": table.losses[sound, c] for c in range(len(table.steps) - 1)}
    return {
        "trials": len(table.points),
        "diverged": int((~sound).sum()),
        "steps": table.steps[-1],
        "best": float(final.min()),
        "median": float(np.median(final)),
        "standard_error": float(np.median(table.errors[sound, -1])),
        "within_one_percent": int((final <= 1.01 * final.min()).sum()),
        "spearman_with_final": {share: float(spearmanr(early, final).statistic) for share, early in at.items()},
        "seconds_variation": float(np.std(table.seconds) / np.mean(table.seconds)),
    }


def measure(tasks: Sequence[str], strategies: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Every strategy on every table, seed by seed."""
    measured: dict[str, Any] = {}
    for task in tasks:
        table = read_table(task)
        measured[task] = {}
        for name in strategies:
            begin = time.perf_counter()
            values = regrets(table, {**STRATEGIES, **EXTRAS}[name], seeds, BUDGETS)
            measured[task][name] = {split: np.round(value, 5).tolist() for split, value in values.items()}
            print(f"{task}: {name}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return {
        "budgets": list(BUDGETS),
        "seeds": [seeds[0], seeds[-1]],
        "ours": OURS,
        "regrets": measured,
        **machine(["jaxtune", "numpy", "scikit-optimize", "scikit-learn", "scipy", "optuna"]),
    }


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of one set of budgets and seeds, measured in parts."""
    whole = {**results[0], "regrets": {}}
    for result in results:
        if (result["budgets"], result["seeds"]) != (whole["budgets"], whole["seeds"]):
            raise SystemExit("the results have other budgets or seeds")
        for task, strategies in result["regrets"].items():
            whole["regrets"].setdefault(task, {}).update(strategies)
    return whole


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """The result with means, bands and facts of the tables."""
    tasks = {}
    for task, strategies in sorted(result["regrets"].items()):
        values = {name: {split: np.array(v) for split, v in strategies[name].items()} for name in strategies}
        ours = values[result["ours"]]
        order = [name for name in (*STRATEGIES, *EXTRAS) if name in values]
        tasks[task] = {
            "table": facts(read_table(task)),
            "strategies": {name: described(values[name], ours) for name in order},
        }
    return {**result, "tasks": tasks, "comparisons": compare(result, tasks)}


def as_text(result: Mapping[str, Any]) -> str:
    """A table for each task."""
    lines, (first, last) = [], result["seeds"]
    for task, measured in result["tasks"].items():
        known = measured["table"]
        lines += [
            f"{task}: {known['trials']} trials of {known['steps']} steps, {known['diverged']} diverged; final loss: "
            f"best {known['best']:.3f}, median {known['median']:.3f}",
            f"mean regret over {last - first + 1} seeds (± half a 95 % band) after a budget of full trainings; "
            f"* {result['ours']} is ahead, - behind, with 95 %",
            "",
            f"{'strategy':<22}" + "".join(f"{budget:>17g}" for budget in result["budgets"]),
        ]
        for name, row in measured["strategies"].items():
            cells = ""
            for at in range(len(result["budgets"])):
                sign = "*" if row["behind_ours_low"][at] > 0 else "-" if row["behind_ours_high"][at] < 0 else " "
                cells += f"{row['mean'][at]:>9.4f} ±{(row['high'][at] - row['low'][at]) / 2:.3f}{sign}"
            lines.append(f"{name:<22}{cells}")
        lines.append("")
    return "\n".join(lines)


def as_markdown(
    result: Mapping[str, Any], names: Sequence[str], *, prefix: str = "", bands: bool = True, tasks: Sequence[str] = ()
) -> str:
    """Rows for a page: each strategy's mean regret at each budget, on one task or on several side by side.

    Args:
      result: a summarised one.
      names: the strategies.
      prefix: of the numbers, ``test_`` for those of the test split.
      bands: half of each 95 % band beside its mean.
      tasks: which; all if empty.
    """
    tasks, budgets = tasks or list(result["tasks"]), result["budgets"]
    named = [f"{task}, " if len(tasks) > 1 else "" for task in tasks]
    columns = [f"{'' if at else name}{budget:g}" for name in named for at, budget in enumerate(budgets)]
    lines = [f"| strategy | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in names:
        cells = ""
        for row in (result["tasks"][task]["strategies"][name] for task in tasks):
            for at in range(len(budgets)):
                band = f" ± {(row[f'{prefix}high'][at] - row[f'{prefix}low'][at]) / 2:.3f}" if bands else ""
                cells += f" {row[f'{prefix}mean'][at]:.3f}{band}{_stars(row, prefix, at)} |"
        lines.append(f"| {name} |{cells}")
    return "\n".join(lines)


def _stars(row: Mapping[str, Any], prefix: str, at: int) -> str:
    """Whether ours is ahead (full) or behind (hollow); two if that is left by Holm's correction."""
    ahead, behind = row[f"{prefix}behind_ours_low"][at] > 0, row[f"{prefix}behind_ours_high"][at] < 0
    if not (ahead or behind):
        return ""
    return " " + ("★" if ahead else "☆") * (2 if row[f"{prefix}after_holm"][at] else 1)


# How each strategy is drawn: colour and dashes. Strategies that share a family share a colour.
LOOKS = {
    "random, full": ("#8a8f98", "2 4"),
    "random, fraction": ("#8a8f98", ""),
    "TPE, full": ("#c2701c", "2 4"),
    "TPE, median pruner": ("#c2701c", "8 4"),
    "TPE, Hyperband": ("#8e4ec6", "8 4"),
    "gp, full": ("#1a7f6b", "2 4"),
    OURS: ("#1a7f6b", ""),
    "tpe, fraction": ("#c2701c", ""),
    "hyperband, fraction": ("#8e4ec6", ""),
}
_STYLE = """
svg { background: #ffffff; } text { font: 12px system-ui, sans-serif; fill: #444b54; } .grid { stroke: #e6e8eb; }
.axis, .tick { stroke: #9aa1aa; } path { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
"""


def figure(task: str, result: Mapping[str, Any]) -> str:
    """Mean regret against budget as an SVG file: every strategy a line, ours with its band."""
    from xml.etree import ElementTree

    from jaxtune.reports import svg

    budgets, every = result["budgets"], result["tasks"][task]["strategies"]
    strategies = {name: every[name] for name in LOOKS if name in every}
    means = [value for row in strategies.values() for value in row["mean"]]
    size, legend = (760, 340), 210
    plot = svg.Plot(
        size,
        svg.linear(budgets, margin=0.03),
        svg.linear([0.0, *means]),
        label=f"Mean regret against budget on {task}",
        x_label="budget in full trainings",
        y_label=f"{task}: regret (validation loss above the best recorded trial)",
        margins=(30, legend, 44, 58),
        interactive=False,
    )
    root = plot.root
    root.set("xmlns", "http://www.w3.org/2000/svg")
    style = ElementTree.Element("style")
    style.text = _STYLE
    root.insert(0, style)
    ours = strategies[result["ours"]]
    outline = [*zip(budgets, ours["low"], strict=True), *reversed(list(zip(budgets, ours["high"], strict=True)))]
    data = svg.path([(plot.x(x), plot.y(y)) for x, y in outline], close=True)
    svg.element(root, "path", d=data, style=f"fill: {LOOKS[result['ours']][0]}; fill-opacity: 0.15; stroke: none")
    # The legend is in the order of the lines at the largest budget.
    for row, (name, values) in enumerate(sorted(strategies.items(), key=lambda item: -item[1]["mean"][-1])):
        colour, dashes = LOOKS[name]
        look = f"stroke: {colour}; stroke-dasharray: {dashes or 'none'}" + (
            "; stroke-width: 3" if name == result["ours"] else ""
        )
        points = [(plot.x(x), plot.y(y)) for x, y in zip(budgets, values["mean"], strict=True)]
        svg.element(root, "path", d=svg.path(points), style=look)
        at = plot.top + 14 + 22 * row
        svg.element(root, "path", d=svg.path([(plot.right + 14, at - 4), (plot.right + 44, at - 4)]), style=look)
        svg.element(root, "text", name, x=plot.right + 52, y=at)
    return svg.to_text(root) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(DEVELOPMENT_TABLES), choices=DEVELOPMENT_TABLES)
    parser.add_argument(
        "--strategies", nargs="+", default=list(STRATEGIES), choices=[*STRATEGIES, *EXTRAS], metavar="NAME"
    )
    wide = parser.add_argument_group("many landscapes", "budgets of 4, 8 and 16; settings are chosen on development")
    which = wide.add_mutually_exclusive_group()
    which.add_argument("--development", action="store_true", help="the recorded tables, and search_bench")
    which.add_argument("--confirmation", metavar="COMMIT", help="what judges the default that a commit made")
    wide.add_argument("--bench", type=Path, default=Path("../shared/search_bench"), help="landscapes, where they are")
    wide.add_argument("--studies", type=Path, nargs="*", default=[], help="finished studies early-score, to confirm on")
    wide.add_argument("--only", nargs="+", help="landscapes whose names begin so; all if unset")
    wide.add_argument("--cells", type=Path, default=Path("cells.jsonl"), help="measured so far; a run goes on from it")
    wide.add_argument("--part", default="0/1", help="i/n: every n-th cell, for several processes")
    wide.add_argument("--minutes", type=float, default=60.0, help="no further cell is begun after them")
    wide.add_argument("--ours", default=landscape_study.OURS, help="the strategy that confirmation judges")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0, help="settings were chosen on seeds from 1000")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--from", dest="source", type=Path, nargs="+", help="read and merge earlier --json outputs")
    parser.add_argument("--figures", type=Path, help="folder for a figure (SVG) of each task")
    parser.add_argument("--markdown", action="store_true", help="the rows of docs/surrogates.md")
    arguments = parser.parse_args()
    if arguments.development or arguments.confirmation:
        landscape_study.run(arguments)
        return
    if arguments.source:
        result = merged([json.loads(path.read_text()) for path in arguments.source])
    else:
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        result = measure(arguments.tasks, arguments.strategies, seeds)
    if all(OURS in strategies for strategies in result["regrets"].values()):
        result = summarised(result)
    elif not arguments.json:
        raise SystemExit(f"--strategies: without {OURS!r} there is nothing to compare with; print --json to merge it")
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        for task in result["tasks"]:
            (arguments.figures / f"surrogates-{task}.svg").write_text(figure(task, result), encoding="utf-8")
    if arguments.markdown:
        measured = [set(row["strategies"]) for row in result["tasks"].values()]
        names = [name for name in (*STRATEGIES, *EXTRAS) if all(name in one for one in measured)]
        for task in result["tasks"]:
            print(f"{task}\n\n{as_markdown(result, names, tasks=[task])}\n")
        print(f"test\n\n{as_markdown(result, names, prefix='test_', bands=False)}")
        return
    print(json.dumps(result) if arguments.json else as_text(result))


if __name__ == "__main__":
    main()
