"""What ``search.terminate: gain`` trades: the share of a search that it saves, and the regret that this costs.

On the development landscapes of benchmarks/landscapes.py that lie in a folder outside this repository: tables of
learning curves of small networks, and a synthetic objective. A search of ``gp`` scores trials at 20 % of their steps
and finishes the five best by the Gaussian process; with the terminator it ends at the trial that promises less than
noise would show (:mod:`jaxtune.search.enough`), without it after all of them. What is saved is a share of all steps,
finishing included; regret is scaled: 0 is the best configuration, 1 the median one. Intervals are 95 % bootstraps over
landscapes, whose runs belong together.

    python benchmarks/terminator.py ../search_bench --json > result.json
    python benchmarks/terminator.py --show benchmarks/results/terminator.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from budgeted import FRACTION, Ending, propose
from budgeted import ranked as best_first
from common import machine
from landscapes import Landscape, Trials, development
from priors import FAMILIES, PACKAGES, SEEDS, interval
from replay import INITIAL

from jaxtune.config.search_section import SearchConfig
from jaxtune.search.enough import Budget, Enough
from jaxtune.search.milestones import milestones
from jaxtune.search.proposals import Request
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import History, Trial, TrialState

ACQUISITIONS = {"thompson": "gp, thompson", "ei": "gp, ei"}
PLANNED, PROMOTED = 30, 5
ENDING = Ending((1.0,), "mean")
_SPACE = {"optimizer.learning_rate": {"log_uniform": (1e-5, 1e-2)}}


def stop(landscape: Landscape, trials: Trials, seed: int) -> int:
    """How many trials a search with the terminator has: as many as there are where it never ends one."""
    search = SearchConfig.model_validate({"space": _SPACE, "terminate": "gain", "trials": PLANNED})
    surrogate = Surrogate(landscape.space, seed=seed, initial=INITIAL)
    enough = Enough(Budget(search, lambda trial: milestones(search, 100)), surrogate)

    def request(number: int) -> Request:
        # A proposal does not know the trial before it.
        known = [(at, trials.observation(at, FRACTION)) for at in range(max(0, number - 1))]
        return Request(number, known, [(at, trials.points[at]) for at in range(len(known), number)])

    for count in range(1, len(trials.points)):
        history = History({number: TrialState(Trial(number, {}, Path())) for number in range(count)})
        if enough.reason(history, (), request) is not None:
            return count
    return len(trials.points)


def outcome(landscape: Landscape, trials: Trials, seed: int, count: int) -> tuple[float, float]:
    """Cost in full trainings and scaled regret of a search that scores the first trials and finishes the best."""
    surrogate = Surrogate(landscape.space, seed=seed, initial=INITIAL)
    kept = best_first(trials, range(count), FRACTION, {}, surrogate)[:PROMOTED]
    early = sum(trials.cost(trial, FRACTION) for trial in range(count))
    later = sum(trials.cost(trial, 1.0) - trials.cost(trial, FRACTION) for trial in kept)
    sound = [trial for trial in kept if np.isfinite(trials.final(trial))]
    best = min(sound, key=trials.final) if sound else None
    return early + later, trials.regret(best)["validation"]


def measure(landscape: Landscape, acquisition: str) -> list[dict[str, float]]:
    """What each seed's search came to, with the terminator and without."""
    runs = []
    for seed in range(SEEDS):
        trials = propose(landscape, ACQUISITIONS[acquisition], seed, PLANNED * FRACTION)
        count = stop(landscape, trials, seed)
        (whole, regret), (spent, ended) = (
            outcome(landscape, trials, seed, number) for number in (len(trials.points), count)
        )
        runs.append({"trials": count, "saved": 1 - spent / whole, "regret": regret, "regret_ended": ended})
    print(f"{acquisition}: {landscape.name}: {runs}", file=sys.stderr, flush=True)
    return runs


def summarize(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """By acquisition: means of what was saved and lost, with intervals, and how many searches ended early."""
    summary = {}
    for acquisition, by_landscape in runs.items():
        of = list(by_landscape.values())

        def told(values: Sequence[Sequence[float]]) -> dict[str, float]:
            low, high = interval(np.array(values))
            return {"mean": float(np.mean(values)), "low": low, "high": high}

        summary[acquisition] = {
            "searches": sum(map(len, of)),
            "ended": sum(run["trials"] < PLANNED for one in of for run in one),
            "trials": float(np.mean([run["trials"] for one in of for run in one])),
            "regret": float(np.mean([run["regret"] for one in of for run in one])),
            "saved": told([[run["saved"] for run in one] for one in of]),
            "lost": told([[run["regret_ended"] - run["regret"] for run in one] for one in of]),
        }
    return summary


def text(summary: Mapping[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| acquisition | ended before all trials | share saved | regret, all trials | regret lost |",
        "|---" * 5 + "|",
    ]
    for acquisition, of in summary.items():
        saved, lost = of["saved"], of["lost"]
        shares = f"{saved['mean']:.2f} ({saved['low']:.2f} to {saved['high']:.2f})"
        regrets = f"{lost['mean']:+.3f} ({lost['low']:+.3f} to {lost['high']:+.3f})"
        lines.append(
            f"| {acquisition} | {of['ended']} of {of['searches']} | {shares} | {of['regret']:.3f} | {regrets} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, or shows what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of the landscapes; without it nothing is measured")
    parser.add_argument("--acquisitions", nargs="+", choices=ACQUISITIONS, default=list(ACQUISITIONS))
    parser.add_argument("--add", "--show", type=Path, help="a result to add to, or to show")
    parser.add_argument("--json", action="store_true", help="print the result for programs")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"runs": {}, "cpu_seconds": {}}
    if arguments.add:
        result |= json.loads(arguments.add.read_text(encoding="utf-8"))
    if arguments.folder:
        landscapes = [one for one in development(arguments.folder) if one.family in FAMILIES]
        result |= {"planned": PLANNED, "promoted": PROMOTED, "seeds": SEEDS, "machine": machine(PACKAGES)}
        for acquisition in arguments.acquisitions:
            begin = time.process_time()
            result["runs"][acquisition] = {one.name: measure(one, acquisition) for one in landscapes}
            result["cpu_seconds"][acquisition] = round(time.process_time() - begin)
    result["summary"] = summarize(result["runs"])
    print(json.dumps(result) if arguments.json else text(result["summary"]))


if __name__ == "__main__":
    main()
