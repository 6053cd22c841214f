"""``jaxtune study early-score``."""

from __future__ import annotations

import argparse

from jaxtune.cli.study.common import add_arguments, run_experiment

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "jaxtune init quickstart && jaxtune study early-score quickstart.yaml search.trials=30"


def run(arguments: argparse.Namespace) -> int:
    """Trains every trial to its end; the same command again goes on where it stopped."""
    return run_experiment(arguments, "early-score")
