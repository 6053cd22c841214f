"""``jaxtune study status``."""

from __future__ import annotations

import argparse
import time

from jaxtune.cli.common import add_json_argument, age, emit, path_argument, table, time_taken
from jaxtune.layout import RunFiles
from jaxtune.search.status import STATES, StudyStatus, TrialStatus, read_status

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
            **_at_rungs(status, trial),
            "early": trial.early_score,
            "final": trial.final_score,
            "": "best" if trial.trial == status.best else "",
        }
        for trial in status.trials
    ]
    fixed = "".join(f", {key} fixed at {value}" for key, value in status.fixed.items())
    kind = f" (experiment {status.experiment})" if status.experiment else ""
    ended = f"; the best {status.promote} go to the end" if status.promote is not None else ""
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
    return "\n".join(lines)


def rungs(status: StudyStatus) -> list[str]:
    """At which shares of their steps trials are looked at: a line; none where that is the fraction alone."""
    ladder, fraction = [f"{share:.3g}" for share in status.shares.ladder], f"{status.shares.fraction:.3g}"
    if not ladder:
        return []
    return [f"the better half goes on at each rung, {', '.join(ladder)} of the steps, and is scored at {fraction}"]


def _at_rungs(status: StudyStatus, trial: TrialStatus) -> dict[str, float | None]:
    """A trial's scores at the rungs, which it passes one after another, by share of its steps."""
    scores = dict(enumerate(trial.rungs.values()))
    return {f"at {share:.3g}": scores.get(place) for place, share in enumerate(status.shares.ladder)}


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
