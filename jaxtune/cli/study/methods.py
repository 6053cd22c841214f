"""``jaxtune study methods``."""

from __future__ import annotations

import argparse

from jaxtune.cli.study.common import add_arguments, run_experiment

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = (
    "jaxtune init quickstart && jaxtune study methods quickstart.yaml \\\n"
    "      'study.methods={compare: [low_rank, dora, lora_fa], rates: 3, further: 0}'"
)


def run(arguments: argparse.Namespace) -> int:
    """Searches a rate for each method, then trains each over seeds; the same command again goes on where it stopped."""
    return run_experiment(arguments, "methods")
