"""``jaxtune study ablation``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from jaxtune.cli.common import table
from jaxtune.cli.study.common import add_arguments, run_experiment

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "jaxtune study ablation configs/studies/ablation.yaml study.ablation.seeds=[1,2,3]"


def run(arguments: argparse.Namespace) -> int:
    """Trains the winner with each key set back; the same command again goes on where it stopped."""
    return run_experiment(arguments, "ablation", _text)


def _text(summary: Mapping[str, Any]) -> str:
    from jaxtune.studies.ablation_page import findings, rows, title

    lines = [table(rows(summary), title=title(summary)), ""] if summary["effects"] else []
    return "\n".join([*lines, *findings(summary)])
