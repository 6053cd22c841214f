"""What the experiments among ``jaxtune study``'s commands share: their arguments, their progress, their end."""

from __future__ import annotations

import argparse
import functools
import importlib
import shlex
from collections.abc import Mapping
from typing import Any

from jaxtune.cli.common import add_config_arguments, add_data_argument, emit, say, start, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares an experiment's arguments."""
    add_config_arguments(parser)
    add_data_argument(parser)


def run_experiment(arguments: argparse.Namespace, study: str) -> int:
    """Runs an experiment, or goes on with it; with ``--dry-run`` only what can be checked before.

    The experiment ``early-score`` is the module :mod:`jaxtune.experiments.early_score`. It has ``check(config)`` for a
    dry run, which returns ``{"trials", "steps", "memory", "warnings"}``, and ``run(config, command=…, hooks=…)``, which
    returns the summary, or None if it was stopped. What people read of it comes from
    :mod:`jaxtune.experiments.early_score_page`.

    Args:
      arguments: of the command.
      study: the experiment's name.
    """
    config = start(arguments)
    module = f"jaxtune.experiments.{study.replace('-', '_')}"
    experiment, page = importlib.import_module(module), importlib.import_module(f"{module}_page")

    from jaxtune.experiments.output import output_directory
    from jaxtune.experiments.run import experiment_config
    from jaxtune.telemetry.progress import ProgressBoard, ProgressDisplay
    from jaxtune.training.hooks import Hooks
    from jaxtune.training.signals import stop_signals

    config = experiment_config(config, study)
    if arguments.dry_run:
        checked = experiment.check(config)
        planned = f"{checked['trials']:,} trials, {checked['steps']:,} steps in all"
        lines = [planned, *(f"never acts: {message}" for message in checked["warnings"])]
        lines.append("everything that can be checked before training is in order")
        emit(checked, arguments.json, "\n".join(lines))
        return 0
    with stop_signals() as should_stop:
        summary = experiment.run(
            config,
            command=shlex.join(["jaxtune", "study", study, arguments.config, *arguments.overrides]),
            hooks=Hooks(
                functools.partial(ProgressDisplay, ProgressBoard()),
                _tell,
                should_stop,
                accept_changed_data=arguments.accept_changed_data,
            ),
        )
    if summary is None:
        emit({"stopped": "signal", "run_dir": config.directory}, arguments.json, "stopped; the same command goes on")
        return 0
    rows = page.rows(summary)
    text = [*([table(rows, title=page.title(summary)), ""] if rows else []), *page.findings(summary)]
    emit(summary, arguments.json, "\n".join([*text, f"results in {output_directory(config, study)}"]))
    return 0


def _tell(event: str, trial: int | None, details: Mapping[str, Any]) -> None:
    if event in ("scored", "finished"):
        say(f"trial {trial}: {details['score']:.4f} at step {details['step']} of {details['total_steps']}")
    elif event == "failed":
        say(f"trial {trial}: diverged after {details['steps_run']} steps")
    elif event == "tested":
        say(f"test: {'untuned model' if trial is None else f'trial {trial}'} {details['score']:.4f}")
