"""``jaxtune study ablation``."""

from __future__ import annotations

import argparse

from jaxtune.cli.study.common import add_arguments, run_experiment

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "jaxtune init quickstart && jaxtune study ablation quickstart.yaml study.ablation.seeds=[1,2,3]"


def run(arguments: argparse.Namespace) -> int:
    """Trains the winner with each key set back; the same command again goes on where it stopped."""
    return run_experiment(arguments, "ablation")
