"""``jaxtune export``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtune.cli import trained
from jaxtune.cli.common import emit, path_argument

EXAMPLE = "jaxtune export runs/quickstart --merged my-model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    subject = trained.add_arguments(parser)
    subject.add_argument(
        "--merge", metavar="DIR,DIR", type=_list(path_argument), help="PEFT adapters of this model, merged into one"
    )
    merging = parser.add_argument_group("merging adapters (--merge), with PEFT's names")
    for option, value, kind, words in _MERGING:
        merging.add_argument(f"--{option}", metavar=value, type=kind, help=words)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--merged", metavar="DIR", type=path_argument, help="a whole model that transformers loads, adapters merged in"
    )
    target.add_argument("--peft", metavar="DIR", type=path_argument, help="an adapter that peft loads")


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values with commas between them as the type of an argument."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return parse


# Each option, what it stands for in the help, its type and its help.
_MERGING: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("method", "NAME", str, "cat, svd (unless you say), linear, ties, dare_linear, dare_ties, magnitude_prune; the "
     "last four also with _svd behind them"),
    ("weights", "W,W", _list(float), "a number for each adapter; 1 unless you say (negative ones: --weights=-1,0.5)"),
    ("density", "SHARE", float, "share of the numbers that ties, dare and magnitude_prune keep"),
    ("rank", "N", int, "of what svd writes; the adapters' largest unless you say"),
    ("majority-sign", "total|frequency", str, "whose sign ties takes: the sum's, or that of most adapters"),
    ("seed", "N", int, "of what dare draws; 0 unless you say"),
)  # fmt: skip


@contextlib.contextmanager
def _merged(arguments: argparse.Namespace) -> Iterator[None]:
    """With ``--merge``, the merged adapter as the one that ``--adapter`` names.

    Raises:
      UserError: the adapters cannot be merged, or an option is given without them.
    """
    from jaxtune.errors import UserError

    given = {option.replace("-", "_"): getattr(arguments, option.replace("-", "_")) for option, *_ in _MERGING}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.merge is None:
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{options}: says how adapters are merged; name them with --merge DIR,DIR")
        yield
        return

    from jaxtune.updates import combine_adapters

    with tempfile.TemporaryDirectory() as scratch:
        combine_adapters(arguments.merge, scratch, **given)
        arguments.adapter = scratch
        yield


def run(arguments: argparse.Namespace) -> int:
    """Writes what was trained in a form that other programs load."""
    with _merged(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    chosen = trained.start_subject(arguments)
    config = chosen.config

    from jaxtune.config.paths import located
    from jaxtune.errors import UserError
    from jaxtune.files import check_writable, whole_or_nothing
    from jaxtune.models import save_model
    from jaxtune.training.opened_config import OpenedConfig
    from jaxtune.updates import merge_adapters

    target = Path(arguments.merged or arguments.peft)
    check_writable(target, "--merged" if arguments.merged else "--peft")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty directory; choose another")
    opened = OpenedConfig(config, parts=())
    subject = chosen.open(opened)
    if arguments.merge is not None:
        subject = dataclasses.replace(subject, origin=f"the merger of {', '.join(arguments.merge)}")
    kind = "merged model" if arguments.merged else "PEFT adapter"
    if arguments.dry_run:
        emit({"checked": True, "subject": subject.origin}, arguments.json, f"would write {subject.origin} to {target}")
        return 0
    trainer, trainable = subject.trainer, subject.state.trainable
    with whole_or_nothing(target):
        if arguments.merged:
            merged = merge_adapters(opened.model, trainer.plan, trainable, trainer.hyperparameters, subject.state.fixed)
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
