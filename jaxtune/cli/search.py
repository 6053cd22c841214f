"""``jaxtune search``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.cli.common import add_config_arguments, add_data_argument, emit, say, start, table, tell, time_taken
from jaxtune.cli.trained import next_steps
from jaxtune.layout import RunFiles

if TYPE_CHECKING:
    from jaxtune.config import Config

EXAMPLE = "jaxtune init quickstart && jaxtune search quickstart.yaml search.trials=20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config_arguments(parser)
    add_data_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs a study; the same command again goes on where it stopped."""
    config = start(arguments)
    if arguments.dry_run:
        from jaxtune.search.run import preflight_search

        checked = preflight_search(config, accept_changed_data=arguments.accept_changed_data)
        emit(checked, arguments.json, _dry_text(checked))
        return 0
    return run_study(config, as_json=arguments.json, accept_changed_data=arguments.accept_changed_data)


def run_study(config: Config, *, as_json: bool, accept_changed_data: bool = False) -> int:
    """Runs the study of a configuration, or goes on with it, and writes its report; returns the exit code."""
    from jaxtune.cli.study.status import standing
    from jaxtune.reports import write_report
    from jaxtune.search.run import search
    from jaxtune.search.status import read_status
    from jaxtune.telemetry.progress import ProgressBoard, ProgressDisplay
    from jaxtune.training.signals import stop_signals

    tell("jaxtune.search.run")
    begun: list[bool] = []

    def planned(rows: Sequence[Mapping[str, Any]]) -> None:
        begun.append(True)
        # Only now is it known that the study can begin.
        say(table(rows, title="what is trained"))
        if (journal := RunFiles(config.directory).journal_path).exists() and journal.stat().st_size:
            say(f"going on with the study in {config.directory}: {standing(read_status(config.directory))}")
        say(f"to watch it: jaxtune report {shlex.quote(config.directory)} --serve")

    # Ray has words of its own for a worker that died, and says them on standard output.
    with stop_signals() as should_stop, contextlib.redirect_stdout(sys.stderr):
        summary = search(
            config,
            listener=functools.partial(ProgressDisplay, ProgressBoard()),
            on_event=_tell,
            on_plan=planned,
            should_stop=should_stop,
            accept_changed_data=accept_changed_data,
        )
    if summary is None:
        again = f"stopped; to go on: jaxtune search {RunFiles(config.directory).config_path}"
        emit({"stopped": "signal", "run_dir": config.directory}, as_json, again)
        return 0
    if not begun:
        say(f"the study in {config.directory} had ended: nothing was trained")
    write_report(config.directory)
    emit(summary, as_json, _text(summary, config))
    return 0


def _tell(event: str, trial: int | None, details: Mapping[str, Any]) -> None:
    if event == "started":
        action = "finishing" if details["phase"] == "final" else "trial"
        values = "  ".join(f"{key.split('.')[-1]}={_short(value)}" for key, value in details["configuration"].items())
        say(f"{action} {trial}: {values}")
    elif event == "proposed" and "prior_dropped" in details:
        say(f"  from trial {trial} on without the priors: {_dropped(details['prior_dropped'])}")
    elif event in ("reported", "scored", "finished", "repeated") and not details["diverged"]:
        say(f"  trial {trial} {event} {details['score']:.4f} at step {details['step']} in {details['seconds']:.1f} s")
    elif event in ("failed", "repeated"):
        say(f"  trial {trial} diverged after {details['steps_run']} steps")
    elif event == "stopped":
        say(f"  trial {trial} stopped at step {details['step']}: others did better there")
    elif event == "enough":
        from jaxtune.search.enough import why_enough

        say(f"  no further trial: {why_enough(details)}")
    elif event == "tested":
        say(f"test: {'untuned model' if trial is None else f'trial {trial}'} {details['score']:.4f}")


def _dropped(scores: int) -> str:
    """Why the priors of a space do not count any more."""
    return f"of the first {scores} scored trials, the better ones are the less likely under them"


def _rungs(summary: Mapping[str, Any]) -> list[str]:
    """How many trials came to each rung after the fraction, the reference among them; nothing without such a rung."""
    rungs = summary.get("finish") or []
    return [f"finished in rungs: {', '.join(map(_rung, rungs))} of the steps"] if rungs else []


def _rung(rung: Mapping[str, Any]) -> str:
    """One rung: ``9 trials at 40% (step 48)``; the step is not there where trials differ in length."""
    step = "" if rung.get("step") is None else f" (step {rung['step']})"
    return f"{len(rung['trials'])} trials at {rung['share']:.0%}{step}"


def _without_priors(summary: Mapping[str, Any]) -> list[str]:
    if not (dropped := summary.get("prior_dropped")):
        return []
    return [f"from trial {dropped['trial']} on without the priors: {_dropped(dropped['scores'])}"]


def _finalists(summary: Mapping[str, Any]) -> list[str]:
    """A table of the trials that were repeated with other seeds; nothing where none was."""
    if not (repeats := summary.get("seeds")):
        return []
    rows = [
        {
            "trial": one["trial"],
            "mean": one["mean"],
            "low": one["low"],
            "high": one["high"],
            **{f"seed {place}": score for place, score in enumerate(one["scores"], 1)},
        }
        for one in repeats["trials"]
    ]
    return [table(rows, title=f"the best again with other seeds, {repeats['confidence']:.0%} intervals"), ""]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _further(summary: Mapping[str, Any]) -> list[str]:
    """The front of several objectives, and what became of the bounds."""
    from jaxtune.cli.study.status import where_met

    lines = []
    if front := summary.get("pareto"):
        rows = [{"trial": entry["trial"], **entry["values"]} for entry in front]
        lines += ["", table(rows, title=f"Pareto front at {summary['fraction']:.0%} of the steps")]
    if where := summary.get("where"):
        lines += ["", *where_met(where["bounds"], where["satisfied"], where["best"])]
    return lines


def _text(summary: Mapping[str, Any], config: Config) -> str:
    rows = [
        {
            "trial": trial["id"],
            "early": trial["early_score"],
            "final": trial["final_score"],
            "status": trial["status"],
            **{key.split(".")[-1]: value for key, value in trial["configuration"].items()},
        }
        for trial in summary["trials"]
        if trial["id"] > 0
    ]
    best, budget = summary["best"], summary["budget"]
    compared = [
        {
            "": "winner (trial " + str(best["trial"]) + ")",
            "validation": best["final_score"],
            "test": best["test_score"],
        },
        {
            "": "reference",
            "validation": summary["baseline"]["final_score"],
            "test": summary["baseline"]["test_score"],
        },
        {"": "untuned model", "validation": None, "test": summary["untuned"]["test_score"]},
    ]
    name = f"{summary['objective']['name']} ({summary['objective']['direction']} is better)"
    saved = max(0.0, 1 - budget["steps_run"] / budget["steps_if_all_finished"])
    return "\n".join(
        [
            table(rows, title="trials"),
            "",
            table(compared, title=name),
            *_further(summary),
            "",
            f"{budget['steps_run']:,} steps instead of {budget['steps_if_all_finished']:,} ({saved:.0%} saved), "
            f"{time_taken(budget['seconds'])}, compiled programs of the train step: {budget['compilations']}",
            *_rungs(summary),
            *_finalists(summary),
            *_without_priors(summary),
            *([] if summary["ended"] == "trials" else [f"ended by: {summary['ended']}"]),
            f"report: {RunFiles(config.directory).report_path}",
            f"the winner again: {best['command']}",
            *next_steps(config, summary),
        ]
    )


def _promotions(finish: Sequence[Mapping[str, Any]]) -> str:
    """How many trials go on to each rung after the fraction, beside the reference: ``8 on to step 16, 4 finished``."""
    *rungs, end = finish
    return ", ".join([*(f"{rung['trials']} on to step {rung['step']}" for rung in rungs), f"{end['trials']} finished"])


def _by(rule: str) -> str:
    """By what trials are promoted, in words."""
    return {"mean": "posterior mean"}.get(rule, rule)


def _searched(key: str, dimension: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the space: what is tried of a key, and what is believed of it."""
    kind, held = next(iter(dimension.items()))
    sure = dimension.get("confidence", "medium") if "prior" in dimension else None
    return {"key": key, "tried": f"{kind} {list(held)}", "prior": dimension.get("prior"), "confidence": sure}


def _repeats(repeats: Mapping[str, Any]) -> str:
    """How often the best are trained again: ``, the best 3 with 2 more seeds each (480 steps)``."""
    if not repeats["trials"]:
        return ""
    further = repeats["seeds"] - 1
    return f", the best {repeats['trials']} with {further} more seeds each ({repeats['steps']:,} steps)"


def _paid(checked: Mapping[str, Any]) -> list[str]:
    """How many of the trials the budget pays for; nothing without one."""
    if not (budget := checked["budget"]):
        return []
    trials, lines = budget["trials"], []
    if trials is not None:
        given = " and ".join(f"{value:,.6g} {name}" for name, value in budget.items() if name in ("steps", "flops"))
        how = "all" if trials == checked["trials"] else f"{trials}"
        lines.append(
            f"search.budget of {given} pays for {how} of {checked['trials']} trials like the reference, finishing "
            f"included; the steps above are of {how}"
        )
    if "seconds" in budget:
        lines.append(
            f"search.budget of {budget['seconds']:,.6g} seconds: how many trials it pays for shows once steps are timed"
        )
    return lines


def _dry_text(checked: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            table(checked["plan"], title="what is trained"),
            table([_searched(key, dimension) for key, dimension in checked["space"].items()], title="what is searched"),
            f"{checked['trials']} trials of {checked['steps_per_trial']} steps "
            f"({checked['early_steps']} at first), {checked['population']} at a time, "
            f"{_promotions(checked['finish'])} by {_by(checked['promote_by'])}{_repeats(checked['repeats'])}: "
            f"{checked['steps']:,} steps in all",
            *([f"finishing straight to the end: {checked['straight']}"] if checked["straight"] else []),
            *_paid(checked),
            f"memory of the step: {checked['memory']['total'] / 2**20:,.0f} MiB per device (an estimate)",
            *(
                f"the winner's {name} takes {checked['disk'][name] / 2**20:,.0f} MiB on the disk"
                for name in ("adapter", "model")
                if name in checked["disk"]
            ),
            *(f"never acts: {message}" for message in checked["warnings"]),
            "everything that can be checked before training is in order",
        ]
    )
