"""``jaxtune plan``, and what ``--dry-run`` prints."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jaxtune.cli.common import add_config_arguments, emit, start, table

if TYPE_CHECKING:
    from jaxtune.config import Config
    from jaxtune.training.run_directory import RunDirectory

EXAMPLE = "jaxtune init quickstart && jaxtune plan quickstart.yaml train.batch_size=32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints what a configuration trains, computes and needs; nothing is trained or written."""
    return check(start(arguments), arguments.json)


def check(
    config: Config, as_json: bool, *, directory: RunDirectory | None = None, accept_changed_data: bool = False
) -> int:
    """Runs all checks that come before training (of the run directory too, if given), and prints what they found."""
    from jaxtune.training.preflight import preflight

    checked = preflight(config, directory=directory, accept_changed_data=accept_changed_data)
    examples = ", ".join(f"{count:,} {part}" for part, count in checked.examples.items())
    memory, disk = checked.memory, checked.disk.items()
    free = f" (an estimate), of {memory['free'] / 2**20:,.0f} MiB free" if "free" in memory else " (an estimate)"
    text = "\n".join(
        [
            table(checked.plan, title="what is trained"),
            "",
            f"{checked.steps:,} steps over {examples} examples",
            f"{checked.flops_per_step:.3g} FLOPs per step",
            f"{memory['total'] / 2**20:,.0f} MiB per device: {memory['arguments'] / 2**20:,.0f} arguments, "
            f"{memory['temporaries'] / 2**20:,.0f} temporaries, {memory['outputs'] / 2**20:,.0f} outputs{free}",
            "on the disk: " + ", ".join(f"{size / 2**20:,.0f} MiB {_each(name)}" for name, size in disk),
            *(f"never acts: {message}" for message in checked.warnings),
            "everything that can be checked before training is in order",
        ]
    )
    emit(checked.as_dict(), as_json, text)
    return 0


def _each(name: str) -> str:
    return "for each checkpoint" if name == "checkpoints" else f"{name} at the end"
