"""Search settings compared on many landscapes, instance by instance: what is measured, and what it comes to.

An instance is a landscape with a seed of the search. Each cell, one proposer on one instance, is a line of a file, so
that a run that is stopped goes on behind the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from budgeted import BUDGETS, FINISHING, FRACTION, PROPOSERS, cell
from common import machine
from comparisons import holm, sign_flips
from landscapes import FIRST_CONFIRMATION_SEED, Landscape, confirmation, development

OLD = "gp, ei: straight, by mean"
"""What studies were before there was a choice: the yardstick of the paired differences."""
OURS = "gp, thompson: rungs 0.4, 1, by score"
"""What was best on development."""
RIVALS = ("random: straight, by score", "Sobol: straight, by score", "TPE: straight, by score")
_RESAMPLES = 4_000
# Strategies are worth a row of the page if they are one of these.
ROWS = (
    *RIVALS,
    "random: rungs 0.4, 1, by score",
    "Sobol: rungs 0.4, 1, by score",
    "TPE: rungs 0.4, 1, by score",
    OLD,
    "gp, ei: straight, by score",
    "gp, ei: rungs 0.4, 1, by mean",
    "gp, ei: rungs 0.4, 1, by score",
    "gp, thompson: straight, by mean",
    "gp, thompson: straight, by score",
    "gp, thompson: rungs 0.4, 1, by mean",
    "gp, thompson: rungs 0.4, 1, by mean, then score",
    "gp, thompson: rungs 0.4, 1, by score",
)


def measure(
    landscapes: Sequence[Landscape], seeds: int, first_seed: int, file: Path, *, part: tuple[int, int], minutes: float
) -> bool:
    """Measures the cells that no file beside this one has, seed after seed; whether all are there.

    Args:
      landscapes: to measure on.
      seeds: of each landscape.
      first_seed: of the tables; made tasks of a confirmation have seeds of their own.
      file: of cells, and of other parts ``file.*``.
      part: which of how many shares of the cells.
      minutes: after which it stops.
    """
    begin = time.monotonic()
    every = [(one, first_seed + at, name) for at in range(seeds) for one in landscapes for name in PROPOSERS]
    for number, (landscape, seed, proposer) in enumerate(every):
        key = landscape.name, seed, proposer
        if number % part[1] != part[0] or key in read_cells(file):
            continue
        if time.monotonic() - begin > 60 * minutes:
            return False
        start = time.process_time()
        regrets = cell(landscape, proposer, seed)
        line = {"landscape": key[0], "family": landscape.family, "seed": seed, "proposer": proposer, "regret": regrets}
        with file.with_name(f"{file.name}.{part[0]}").open("a", encoding="utf-8") as out:
            out.write(json.dumps({**line, "seconds": round(time.process_time() - start, 1)}) + "\n")
        print(f"{key}: {time.process_time() - start:.1f} s", file=sys.stderr, flush=True)
    return True


def read_cells(file: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The cells of all parts."""
    lines = [line for path in sorted(file.parent.glob(f"{file.name}.*")) for line in path.read_text().splitlines()]
    cells = map(json.loads, lines)
    return {(one["landscape"], one["seed"], one["proposer"]): one for one in cells}


def gathered(cells: Mapping[tuple[str, int, str], Mapping[str, Any]]) -> dict[str, Any]:
    """The regrets of whole instances: by split, strategy and instance, with each instance's landscape and family."""
    keys = sorted({(landscape, seed) for landscape, seed, _ in cells})
    whole = [key for key in keys if all((*key, name) in cells for name in PROPOSERS)]
    if not whole:
        raise SystemExit("no instance has all its proposers yet: go on with the same --cells")
    families = {landscape: cells[landscape, seed, next(iter(PROPOSERS))]["family"] for landscape, seed in whole}
    regrets: dict[str, dict[str, list[list[float] | None]]] = {"validation": {}, "test": {}}
    for split, rows in regrets.items():
        for proposer in PROPOSERS:
            measured = [cells[(*key, proposer)]["regret"] for key in whole]
            for ending in measured[0]:
                if all(ending in one for one in measured):
                    rows[f"{proposer}: {ending}"] = [one[ending].get(split) for one in measured]
    return {"instances": [list(key) for key in whole], "families": families, "regrets": regrets}


def summarised(result: Mapping[str, Any]) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals, and paired differences from the old default and ours, over instances."""
    summary: dict[str, Any] = {}
    for split, rows in result["regrets"].items():
        has = [at for at, one in enumerate(rows[OLD]) if one is not None]
        if not has:
            continue
        landscape = np.array([result["instances"][at][0] for at in has])
        old, ours = (np.array([rows[name][at] for at in has]) for name in (OLD, OURS))
        summary[split] = {"instances": len(has), "strategies": {}}
        for name in (name for name in ROWS if name in rows):
            values = np.array([rows[name][at] for at in has])
            low, high = interval(values, landscape)
            ahead_low, ahead_high = interval(values - old, landscape)
            ours_low, ours_high = interval(values - ours, landscape)
            families = np.array([result["families"][one] for one in landscape])
            summary[split]["strategies"][name] = {
                "mean": values.mean(0).tolist(),
                "low": low,
                "high": high,
                "against_old": (values - old).mean(0).tolist(),
                "against_old_low": ahead_low,
                "against_old_high": ahead_high,
                "against_ours": (values - ours).mean(0).tolist(),
                "against_ours_low": ours_low,
                "against_ours_high": ours_high,
                "families": {one: values[families == one].mean(0).tolist() for one in dict.fromkeys(families.tolist())},
            }
    return summary


def interval(values: np.ndarray, landscape: np.ndarray) -> tuple[list[float], list[float]]:
    """95 % bootstrap intervals of the means of columns; seeds are resampled within each landscape, which are given."""
    generator = np.random.default_rng(0)
    drawn = np.empty((_RESAMPLES, len(values)), int)
    for name in np.unique(landscape):
        members = np.flatnonzero(landscape == name)
        drawn[:, members] = generator.choice(members, (_RESAMPLES, len(members)))
    means = values[drawn].mean(1)
    return np.percentile(means, 2.5, axis=0).tolist(), np.percentile(means, 97.5, axis=0).tolist()


def judged(result: Mapping[str, Any], ours: str) -> dict[str, Any]:
    """The default against each rival at each budget, tested together (sign flips, Holm's correction at 5 %)."""
    rows = result["regrets"]["validation"]
    mine = np.array(rows[ours])
    differences = [np.array(rows[name]) - mine for name in RIVALS]
    p_values = sign_flips(np.concatenate(differences, axis=1))
    left = iter(zip(p_values, holm(p_values), strict=True))
    landscape = np.array([name for name, _ in result["instances"]])
    verdict: dict[str, Any] = {}
    for name, difference in zip(RIVALS, differences, strict=True):
        low, high = interval(-difference, landscape)
        tests = [next(left) for _ in BUDGETS]
        verdict[name] = {
            "difference": (-difference.mean(0)).tolist(),
            "low": low,
            "high": high,
            "p": [p for p, _ in tests],
            "told_apart": [bool(told) for _, told in tests],
        }
    return {"ours": ours, "rivals": verdict}


def document(result: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What is committed."""
    return {
        "budgets": list(BUDGETS),
        "fraction": FRACTION,
        "finishing": FINISHING,
        "old": OLD,
        **more,
        "summary": summarised(result),
        **result,
        **machine(["jaxtune", "numpy", "scikit-optimize", "scikit-learn", "scipy", "optuna"]),
    }


def as_markdown(summary: Mapping[str, Any], split: str) -> str:
    """Rows for a page: mean regret, and the difference from the old default with its 95 % interval."""
    lines = [
        "| strategy | " + " | ".join(f"{budget}" for budget in BUDGETS) + " |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    for name, row in summary[split]["strategies"].items():
        cells = ""
        for at in range(len(BUDGETS)):
            low, high = row["against_old_low"][at], row["against_old_high"][at]
            paired = "" if name == OLD else f" ({row['against_old'][at]:+.3f} [{low:+.3f}, {high:+.3f}])"
            cells += f" {row['mean'][at]:.3f}{paired} |"
        lines.append(f"| {name} |{cells}")
    return "\n".join(lines)


def promotions_as_markdown(summary: Mapping[str, Any]) -> str:
    """Rows for a page: promotion other than ours, all else the same, less ours, with its 95 % interval."""
    columns = [f"{split if not at else ''} {budget}".strip() for split in summary for at, budget in enumerate(BUDGETS)]
    lines = [f"| promoted by | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    same = f"{OURS.split(', by ')[0]}, by "
    others = [name for name in ROWS if name.startswith(same) and name != OURS]
    for name in (name for name in others if name in next(iter(summary.values()))["strategies"]):
        cells = ""
        for row in (one["strategies"][name] for one in summary.values()):
            for mean, low, high in zip(
                row["against_ours"], row["against_ours_low"], row["against_ours_high"], strict=True
            ):
                cells += f" {mean:+.3f} [{low:+.3f}, {high:+.3f}] |"
        lines.append(f"| {name.removeprefix(same)} |{cells}")
    return "\n".join(lines)


def judged_as_markdown(judged: Mapping[str, Any]) -> str:
    """Rows for a page: ours less each rival, with its 95 % interval and p; ★ where Holm's correction leaves it."""
    lines = [f"| less | {' | '.join(map(str, BUDGETS))} |", "|---|" + "---|" * len(BUDGETS)]
    for name, row in judged["rivals"].items():
        columns = (row[key] for key in ("difference", "low", "high", "p", "told_apart"))
        cells = ""
        for difference, low, high, p, told in zip(*columns, strict=True):
            cells += f" {difference:+.3f} [{low:+.3f}, {high:+.3f}], p {p:.3f}{' ★' if told else ''} |"
        lines.append(f"| {name} |{cells}")
    return "\n".join(lines)


def as_text(result: Mapping[str, Any]) -> str:
    """All splits, and the verdict where there is one."""
    summary = result["summary"]
    lines = [
        f"{split}, {one['instances']} instances\n\n{as_markdown(summary, split)}\n" for split, one in summary.items()
    ]
    for name, row in result.get("judged", {}).get("rivals", {}).items():
        told = zip(
            result["budgets"], row["difference"], row["low"], row["high"], row["p"], row["told_apart"], strict=True
        )
        for budget, difference, low, high, p, left in told:
            lines.append(f"{name}, {budget}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], p {p:.4f}, {left}")
    return "\n".join(lines)


def require_commit(commit: str) -> str:
    """The full name of the commit that made the default, which confirmation is to judge.

    Raises:
      SystemExit: it is no commit that the tree at hand goes back to.
    """

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)

    found = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    if found.returncode or git("merge-base", "--is-ancestor", commit, "HEAD").returncode:
        raise SystemExit(f"--confirmation {commit}: no commit of this tree; name the one that made the default")
    return found.stdout.strip()


def run(arguments: argparse.Namespace) -> None:
    """What benchmarks/surrogates.py does on many landscapes: measures, and prints what whole instances come to."""
    confirming = arguments.confirmation is not None
    commit = require_commit(arguments.confirmation) if confirming else None
    found = confirmation(arguments.bench, arguments.studies) if confirming else development(arguments.bench)
    if arguments.only:
        found = [one for one in found if one.name.startswith(tuple(arguments.only))]
    place, parts = (int(number) for number in arguments.part.split("/"))
    first = FIRST_CONFIRMATION_SEED if confirming else 0
    measure(found, arguments.seeds, first, arguments.cells, part=(place, parts), minutes=arguments.minutes)
    result = gathered(read_cells(arguments.cells))
    more = {"commit": commit, "judged": judged(result, arguments.ours)} if confirming else {}
    whole = document(result, **more)
    print(json.dumps(whole) if arguments.json else as_text(whole))
