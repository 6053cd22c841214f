"""``jaxtune evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxtune.cli import trained
from jaxtune.cli.common import emit, path_argument, say, table

EXAMPLE = "jaxtune evaluate runs/quickstart --split test --predictions predictions.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    trained.add_arguments(parser)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        type=path_argument,
        help="write every prompt, prediction and reference as JSONL",
    )


def run(arguments: argparse.Namespace) -> int:
    """Scores a trained run, an adapter or the untuned model: loss, and the task metric if a task is configured."""
    chosen = trained.start_subject(arguments)
    config = chosen.config

    from jaxtune.errors import UserError
    from jaxtune.files import check_writable, write_atomically
    from jaxtune.training.opened_config import OpenedConfig

    if getattr(config.data, arguments.split) is None:
        raise UserError(f"data.{arguments.split}: the configuration has no such split; name another with --split")
    if arguments.predictions:
        check_writable(arguments.predictions, "--predictions")
        if Path(arguments.predictions).is_dir():
            raise UserError(f"--predictions: {arguments.predictions} is a directory, not a file")
    opened = OpenedConfig(config)
    subject = chosen.open(opened)
    evaluator = opened.evaluator(arguments.split)
    if arguments.predictions and evaluator is None:
        raise UserError("--predictions needs evaluation.task, which is 'none'")
    if arguments.dry_run:
        emit({"checked": True, "subject": subject.origin}, arguments.json, f"would evaluate {subject.origin}")
        return 0
    batches = opened.loss_batches(arguments.split)
    assert batches is not None
    loss = subject.trainer.evaluate(subject.state, batches)
    metrics: dict[str, float] = {"loss": loss.loss}
    errors = {} if loss.standard_error is None else {"loss": loss.standard_error}
    if evaluator is not None:
        task = evaluator.evaluate(*subject.apply())
        metrics |= task.metrics
        errors |= task.standard_errors
        if arguments.predictions:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in task.records)
            write_atomically(Path(arguments.predictions), lines)
            say(f"{len(task.records):,} predictions in {arguments.predictions}")
    result = {"subject": subject.origin, "split": arguments.split, "metrics": metrics, "standard_errors": errors}
    rows = [{"metric": name, "value": value, "± se": errors.get(name)} for name, value in metrics.items()]
    emit(result, arguments.json, table(rows, title=f"{subject.origin} on {arguments.split}"))
    return 0
