"""``jaxtune study data-size``."""

from __future__ import annotations

import argparse

from jaxtune.cli.study.common import add_arguments, run_experiment

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "jaxtune init quickstart && jaxtune study data-size quickstart.yaml train.evaluate_every=40"


def run(arguments: argparse.Namespace) -> int:
    """Trains on more and more documents; the same command again goes on where it stopped."""
    return run_experiment(arguments, "data-size")
