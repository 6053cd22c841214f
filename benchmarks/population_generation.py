"""Answers of a population's trials: generated in one decode loop, and one trial after another.

Both sides answer the first questions of a configuration's validation split with the same adapters of several ranks, on
one copy of the base. Each side runs in a process of its own, in turns; the medians over all its rounds are compared.
Compiling is told apart. The load of the machine when a round begins stands beside the result.

    python benchmarks/population_generation.py configs/quickstart.yaml --json
    python benchmarks/population_generation.py configs/quickstart.yaml model.path=MODEL --trials 4 --questions 16
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from common import machine

SIDES = ("side_by_side", "one_after_another")
RANKS = (4, 8, 16, 32)
PACKAGES = ("jax", "jaxlib", "transformers")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One round of one side: seconds to compile and answer, then to answer alone, and what the answers are."""
    import jax
    import jax.numpy as jnp

    from jaxtune.config import load_config
    from jaxtune.training.opened_config import OpenedConfig
    from jaxtune.training.stacked_adapters import StackedAdapters

    changes = [*arguments.overrides, f"evaluation.limit={arguments.questions}", f"update.0.rank={max(RANKS)}"]
    opened = OpenedConfig(load_config(arguments.config, changes))
    trainer, evaluator = opened.trainer(), opened.evaluator("validation")
    assert evaluator is not None, "the configuration scores no answers"
    runs = []
    for trial in range(arguments.trials):
        values = {"update.0.rank": float(RANKS[trial % len(RANKS)])}
        state = trainer.init(values, seed=trial)
        # At its start a term changes nothing, and all would answer alike.
        for number, arrays in enumerate(state.trainable["low_rank"].values()):
            key = jax.random.fold_in(jax.random.key(trial), number)
            arrays["b"] = 0.02 * jax.random.normal(key, arrays["b"].shape, jnp.float32)
        runs.append((state, values))
    stack = StackedAdapters(trainer, arguments.trials)

    def answer() -> tuple[float, list[Any]]:
        begin = time.perf_counter()
        if arguments.side == "side_by_side":
            results = evaluator.evaluate_side_by_side(trainer.params, stack(runs), arguments.trials)
        else:
            results = [evaluator.evaluate(*trainer.apply(state, values)) for state, values in runs]
        return time.perf_counter() - begin, [[record["prediction"] for record in each.records] for each in results]

    first, answers = answer()
    seconds = [answer()[0] for _ in range(arguments.repeats)]
    distinct = len({json.dumps(each) for each in answers})
    words = sum(len(text.split()) for each in answers for text in each)
    return {
        "first_seconds": first,
        "seconds": seconds,
        "answers": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
        "distinct": distinct,
        "words": words,
        "questions": len(evaluator.examples),
        "programs": opened.generator.compilations,
        "batch_size": opened.generator.batch_size,
        "groups": opened.generator.groups(arguments.trials),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of a process, behind one that compiles")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    loads = []
    for _ in range(arguments.rounds):
        for side in SIDES:
            loads.append(round(os.getloadavg()[0], 1))
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side], stdout=subprocess.PIPE, text=True, check=True
            )
            rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
    result = combined(arguments, rounds, loads)
    print(json.dumps(result) if arguments.json else as_text(result))


def combined(
    arguments: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]], loads: list[float]
) -> dict[str, Any]:
    """The rounds of both sides as one result."""
    ran = [one for side in SIDES for one in rounds[side]]
    sides = {
        side: {
            "seconds_median": statistics.median(value for one in rounds[side] for value in one["seconds"]),
            "seconds_minimum": min(value for one in rounds[side] for value in one["seconds"]),
            "first_seconds_median": statistics.median(one["first_seconds"] for one in rounds[side]),
        }
        for side in SIDES
    }
    cores = os.cpu_count() or 1
    return {
        **sides,
        "ratio": sides["one_after_another"]["seconds_median"] / sides["side_by_side"]["seconds_median"],
        "same_answers": len({one["answers"] for one in ran}) == 1,
        "distinct_trials": ran[0]["distinct"],
        "words_answered": ran[0]["words"],
        "setting": {
            "config": arguments.config,
            "overrides": arguments.overrides,
            "trials": arguments.trials,
            "questions": ran[0]["questions"],
            "batch_size": ran[0]["batch_size"],
            "groups": ran[0]["groups"],
            "rounds": arguments.rounds,
            "repeats": arguments.repeats,
        },
        "machine": {**machine(PACKAGES), "loads": loads, "loaded": max(loads) > 1.5 * cores},
    }


def as_text(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{side.replace('_', ' '):<20}{values['seconds_median']:>9.2f} s, first {values['first_seconds_median']:.1f} s"
        for side, values in result.items()
        if side in SIDES
    ]
    same = "the same answers" if result["same_answers"] else "NOT the same answers"
    loaded = "; the machine was loaded" if result["machine"]["loaded"] else ""
    return "\n".join([*lines, f"ratio {result['ratio']:.2f}, {same}{loaded}"])


if __name__ == "__main__":
    main()
