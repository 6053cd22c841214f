"""``jaxtune train``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.cli.common import add_config_arguments, add_data_argument, emit, say, start, table, tell
from jaxtune.cli.plan import check
from jaxtune.cli.trained import next_steps

if TYPE_CHECKING:
    from jaxtune.config import Config

EXAMPLE = "jaxtune init tfds && jaxtune train tfds.yaml optimizer.learning_rate=3e-4 run_dir=runs/mine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config_arguments(parser)
    add_data_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains one configuration; the same command again goes on where it stopped."""
    config = start(arguments)

    from jaxtune.training.run_directory import RunDirectory

    if arguments.dry_run:
        directory = RunDirectory(config.directory)
        return check(config, arguments.json, directory=directory, accept_changed_data=arguments.accept_changed_data)

    tell("jaxtune.training.save_schedule")

    from jaxtune.telemetry.progress import ProgressDisplay
    from jaxtune.training.run import Diverged, train
    from jaxtune.training.signals import stop_signals

    begun: list[bool] = []

    def planned(rows: Sequence[Mapping[str, Any]]) -> None:
        begun.append(True)
        say(table(rows, title="what is trained"))

    try:
        with stop_signals() as should_stop:
            summary = train(
                config,
                listener=ProgressDisplay(title=config.name),
                should_stop=should_stop,
                on_plan=planned,
                accept_changed_data=arguments.accept_changed_data,
            )
    except Diverged as error:
        say(f"jaxtune: {error}")
        return 1
    if not begun:
        say(f"the run in {config.directory} had ended: nothing was trained; more train.steps take it further")
    emit(summary, arguments.json, _text(summary, config))
    return 0


def _text(summary: dict, config: Config) -> str:
    lines = [f"{summary['stopped']} at step {summary['steps']} in {summary['seconds']:.1f} s"]
    lines += [f"  {name:<32} {value:.6g}" for name, value in summary["metrics"].items() if value is not None]
    if summary["stopped"] == "signal":
        lines.append("stopped before the end; the same command goes on from here")
    lines.append(f"results in {summary['run_dir']}")
    if summary["stopped"] != "signal":
        lines += next_steps(config, summary)
    return "\n".join(lines)
