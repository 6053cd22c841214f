"""``jaxtune study show``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.cli.common import add_json_argument, emit, path_argument, table

EXAMPLE = "jaxtune study show runs/quickstart 7"

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=path_argument, help="a study's directory")
    parser.add_argument("trial", metavar="TRIAL", help="the trial's number; 0 is the reference")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Shows one trial: its configuration, its curve, its outcomes, the command that runs it by itself."""
    from jaxtune.search.details import trial_details

    details = trial_details(arguments.run_dir, arguments.trial)
    emit(details, arguments.json, _text(details))
    return 0


def _text(details: Mapping[str, Any]) -> str:
    settings = [{"key": key, "value": str(value)} for key, value in details["configuration"].items()]
    scored = [
        *(("rung", outcome) for outcome in details["rungs"]),
        *((name, outcome) for name in ("early", "final") if (outcome := details[name]) is not None),
    ]
    # On a rung of the ladder a trial is before the fraction, on one of the finish after it.
    scored.sort(key=lambda named: named[1]["steps_run"])
    scored += [(f"with seed {seed}", outcome) for seed, outcome in details["repeats"].items()]
    if details["test"] is not None:
        scored.append(("on the test split", details["test"]))
    outcomes = [
        {
            "scored": name,
            "step": outcome.get("steps_run", details["total_steps"]),
            "score": outcome["score"],
            "standard_error": outcome.get("standard_error"),
            "seconds": max(0.0, outcome["seconds"]),
        }
        for name, outcome in scored
    ]
    promoted = details["promoted"]
    ranked = "" if promoted is None else f", promoted in place {promoted['rank']}"
    lines = [
        f"trial {details['trial']}: {details['status']}{ranked}, proposed by {details['source']}",
        table(settings),
        *(f"{name}: {value:,.6g}" for name, value in details["costs"].items()),
        "",
    ]
    lines += [table(outcomes), ""] if outcomes else []
    for title, curve in (("training loss", details["curve"]), ("validation loss", details["validation_curve"])):
        lines += _drawn(title, curve)
    return "\n".join([*lines, f"files: {details['directory']}", f"again, by itself: {details['command']}"])


def _drawn(title: str, curve: Sequence[Sequence[Any]]) -> list[str]:
    """A curve as a line of bars between its first and its last value."""
    values = [value for _, value in curve if value is not None]
    if not values:
        return []
    steps = [step for step, _ in curve]
    return [
        f"{title}, steps {steps[0]:,} to {steps[-1]:,}, between {min(values):.4g} and {max(values):.4g}",
        f"  {values[0]:.4g} {sparkline([value for _, value in curve])} {values[-1]:.4g}",
        "",
    ]


def sparkline(values: Sequence[float | None], width: int = _WIDTH) -> str:
    """Values as bars, the lowest the shortest; longer rows are thinned, what is not finite is a cross."""
    stride = max(1.0, len(values) / width)
    shown = [
        values[min(len(values) - 1, int((index + 1) * stride) - 1)] for index in range(round(len(values) / stride))
    ]
    finite = [value for value in shown if value is not None]
    if not finite:
        return "×" * len(shown)
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join("×" if value is None else _BARS[round((value - low) * scale)] for value in shown)
