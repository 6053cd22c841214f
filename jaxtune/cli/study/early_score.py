"""``jaxtune study early-score``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from jaxtune.cli.common import table
from jaxtune.cli.study.common import add_arguments, run_experiment

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "jaxtune study early-score configs/studies/early-score.yaml search.trials=30"


def run(arguments: argparse.Namespace) -> int:
    """Trains every trial to its end; the same command again goes on where it stopped."""
    return run_experiment(arguments, "early-score", _text)


def _text(summary: Mapping[str, Any]) -> str:
    from jaxtune.studies.early_score_page import findings, rows, title

    return "\n".join([table(rows(summary), title=title(summary)), "", *findings(summary)])
