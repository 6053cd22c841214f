"""``jaxtune study status``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtune.cli.common import add_json_argument, age, emit, path_argument, table, time_taken
from jaxtune.config.search_section import BoundConfig
from jaxtune.layout import RunFiles
from jaxtune.search.objectives import bounds_in_words
from jaxtune.search.status import STATES, StudyStatus, read_status

EXAMPLE = "jaxtune study status runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=path_argument, help="a study's directory")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Shows where a study stands, while it runs and after."""
    status = read_status(arguments.run_dir)
    emit(status.as_dict(), arguments.json, text(status))
    return 0


def text(status: StudyStatus) -> str:
    """The status for people."""
    rows = [
        {
            "trial": trial.trial,
            "state": trial.state,
            "from": trial.source,
            "step": trial.step,
            "of": trial.until,
            **_at_rungs(status.shares.ladder, scores),
            "early": trial.early_score,
            **_at_rungs(status.shares.finish[:-1], scores),
            "final": trial.final_score,
            **trial.values,
            "": "best" if trial.trial == status.best else "",
        }
        for trial, scores in ((trial, iter(trial.rungs.values())) for trial in status.trials)
    ]
    fixed = "".join(f", {key} fixed at {value}" for key, value in status.fixed.items())
    kind = f" (experiment {status.experiment})" if status.experiment else ""
    ended = f"; {_promotions(status)}" if status.promote is not None else ""
    lines = [
        f"{status.directory}: {status.phase}{kind}",
        f"{standing(status)}{ended}{fixed}",
        *rungs(status),
        f"{status.steps:,} steps in {time_taken(status.seconds)} of training and scoring",
        running(status),
    ]
    if rows:
        name = f"{status.objective} ({status.direction} is better)"
        lines += ["", table(rows, title=name)]
    if status.front:
        lines += ["", f"Pareto front at the fraction: trials {', '.join(map(str, status.front))}"]
    if status.satisfied is not None:
        best = next(trial for trial in status.trials if trial.trial == status.best)
        known = {**best.values, status.objective: best.early_score if best.final_score is None else best.final_score}
        lines += ["", *where_met(status.where, status.satisfied, {name: known[name] for name in status.where})]
    return "\n".join(lines)


def _promotions(status: StudyStatus) -> str:
    """How many trials go on after the fraction, and how far."""
    assert status.promote is not None
    numbers, shares = status.shares.promotions(status.promote), status.shares.finish
    steps = [None] * len(shares) if status.length is None else status.shares.steps(status.length).legs
    parts = [
        f"{number} go to {'the end' if share == 1 else f'{share:.3g} of the steps'}"
        f"{'' if step is None else f' (step {step})'}"
        for number, share, step in zip(numbers, shares, steps, strict=True)
    ]
    return f"the best {', the best '.join(parts)}"


def rungs(status: StudyStatus) -> list[str]:
    """At which shares of their steps trials are looked at: a line; none where that is the fraction alone."""
    ladder, fraction = [f"{share:.3g}" for share in status.shares.ladder], f"{status.shares.fraction:.3g}"
    if not ladder:
        return []
    return [f"the better half goes on at each rung, {', '.join(ladder)} of the steps, and is scored at {fraction}"]


def _at_rungs(shares: Sequence[float], scores: Iterator[float | None]) -> dict[str, float | None]:
    """The next scores of a trial, which passes its rungs one after another, by share of its steps."""
    return {f"at {share:.3g}": next(scores, None) for share in shares}


def where_met(where: Mapping[str, Any], satisfied: bool, best: Mapping[str, float | None]) -> list[str]:
    """Whether the best trial satisfies the bounds, with what it has."""
    words = bounds_in_words({name: BoundConfig(**bound) for name, bound in where.items()})
    has = ", ".join(f"{name} {'unknown' if value is None else f'{value:,.6g}'}" for name, value in best.items())
    if satisfied:
        return [f"the best of the trials with {words}; it has {has}"]
    return [f"no trial that was scored so far has {words}: the best violates it least, with {has}"]


def standing(status: StudyStatus) -> str:
    """How many trials there are, and in which states."""
    counts = ", ".join(f"{count} {state}" for state in STATES if (count := status.count(state)))
    return f"{len(status.trials)} of {status.planned} trials proposed{f': {counts}' if counts else ''}"


def running(status: StudyStatus) -> str:
    """Who runs the study, or how it goes on."""
    now = time.time()
    if status.holder is not None:
        since = "" if status.holder.started is None else f" ({age(now - status.holder.started)} ago)"
        return f"run by {status.holder.text}{since}"
    idle = f"nobody runs it; the last record is {age(now - status.last)} old"
    if status.phase == "finished":
        return idle
    command = f"study {status.experiment}" if status.experiment else "search"
    return f"{idle}; to go on: jaxtune {command} {RunFiles(status.directory).config_path}"
