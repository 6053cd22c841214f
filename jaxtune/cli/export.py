"""``jaxtune export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtune.cli import trained
from jaxtune.cli.common import emit, path_argument

EXAMPLE = "jaxtune export runs/quickstart --merged my-model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    trained.add_arguments(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--merged", metavar="DIR", type=path_argument, help="a whole model that transformers loads, adapters merged in"
    )
    target.add_argument("--peft", metavar="DIR", type=path_argument, help="an adapter that peft loads")


def run(arguments: argparse.Namespace) -> int:
    """Writes what was trained in a form that other programs load."""
    chosen = trained.start_subject(arguments)
    config = chosen.config

    from jaxtune.config.paths import located
    from jaxtune.errors import UserError
    from jaxtune.files import check_writable, whole_or_nothing
    from jaxtune.models import save_model
    from jaxtune.training.experiment import Experiment
    from jaxtune.updates import merge_adapters

    target = Path(arguments.merged or arguments.peft)
    check_writable(target, "--merged" if arguments.merged else "--peft")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty directory; choose another")
    experiment = Experiment(config, parts=())
    subject = chosen.open(experiment)
    kind = "merged model" if arguments.merged else "PEFT adapter"
    if arguments.dry_run:
        emit({"checked": True, "subject": subject.origin}, arguments.json, f"would write {subject.origin} to {target}")
        return 0
    trainer, trainable = subject.trainer, subject.state.trainable
    with whole_or_nothing(target):
        if arguments.merged:
            merged = merge_adapters(
                experiment.model, trainer.plan, trainable, trainer.hyperparameters, subject.state.fixed
            )
            source, revision = located(config).model.tokenizer_source
            save_model(merged, target, tokenizer_from=source, tokenizer_revision=revision)
        else:
            base, revision = located(config).model.path, config.model.revision
            trainer.save_adapter(target, subject.state, base=base, revision=revision)
    emit(
        {"subject": subject.origin, "kind": kind, "path": str(target)},
        arguments.json,
        f"{kind} of {subject.origin} in {target}",
    )
    return 0
