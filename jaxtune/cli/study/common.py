"""What the experiments among ``jaxtune study``'s commands share: their arguments, their progress, their end."""

from __future__ import annotations

import argparse
import functools
import importlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.cli.common import add_config_arguments, emit, say, start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares an experiment's arguments."""
    add_config_arguments(parser)


def run_experiment(arguments: argparse.Namespace, study: str, text: Callable[[Mapping[str, Any]], str]) -> int:
    """Runs an experiment, or goes on with it; with ``--dry-run`` only what can be checked before.

    The experiment ``early-score`` is the module :mod:`jaxtune.studies.early_score`. It has
    ``check(config) -> {"trials", "steps"}`` for a dry run, and ``run(config, command=…, listener=…, on_event=…,
    should_stop=…)``, which returns the summary, or None if it was stopped.

    Args:
      arguments: of the command.
      study: the experiment's name.
      text: its summary for people.
    """
    config = start(arguments)
    experiment = importlib.import_module(f"jaxtune.studies.{study.replace('-', '_')}")

    from jaxtune.studies.output import output_directory
    from jaxtune.studies.run import experiment_config
    from jaxtune.telemetry.progress import ProgressBoard, ProgressDisplay
    from jaxtune.training.signals import stop_signals

    config = experiment_config(config, study)
    if arguments.dry_run:
        checked = experiment.check(config)
        planned = f"{checked['trials']:,} trials, {checked['steps']:,} steps in all"
        emit(checked, arguments.json, f"{planned}\neverything that can be checked before training is in order")
        return 0
    with stop_signals() as should_stop:
        summary = experiment.run(
            config,
            command=shlex.join(["jaxtune", "study", study, arguments.config, *arguments.overrides]),
            listener=functools.partial(ProgressDisplay, ProgressBoard()),
            on_event=_tell,
            should_stop=should_stop,
        )
    if summary is None:
        emit({"stopped": "signal", "run_dir": config.directory}, arguments.json, "stopped; the same command goes on")
        return 0
    emit(summary, arguments.json, f"{text(summary)}\nresults in {output_directory(config, study)}")
    return 0


def _tell(event: str, trial: int | None, details: Mapping[str, Any]) -> None:
    if event in ("scored", "finished"):
        say(f"trial {trial}: {details['score']:.4f} at step {details['step']} of {details['total_steps']}")
    elif event == "failed":
        say(f"trial {trial}: diverged after {details['steps_run']} steps")
    elif event == "tested":
        say(f"test: {'untuned model' if trial is None else f'trial {trial}'} {details['score']:.4f}")
