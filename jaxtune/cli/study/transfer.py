"""``jaxtune study transfer``."""

from __future__ import annotations

import argparse

from jaxtune.cli.study.common import add_arguments, run_experiment

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = (
    "jaxtune init quickstart && jaxtune study transfer quickstart.yaml \\\n"
    "      'study.transfer.settings={short: {train.steps: 24}}'"
)


def run(arguments: argparse.Namespace) -> int:
    """Trains one design in every setting; the same command again goes on where it stopped."""
    return run_experiment(arguments, "transfer")
