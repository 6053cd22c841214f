"""The ``jaxtune`` command: finds the subcommand, turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from jaxtune.cli.dispatch import Commands, Parser, dispatch
from jaxtune.cli.surroundings import make_home_usable, make_streams_usable
from jaxtune.errors import UserError

__all__ = ["COMMANDS", "Parser", "main"]

COMMANDS = {
    "init": "list the configurations that come with the package, or copy one to begin with",
    "search": "find the configuration worth finishing among many short trials",
    "train": "train one configuration",
    "plan": "what a configuration trains, computes and needs in memory",
    "evaluate": "score a trained run, or the untuned model, on a split",
    "generate": "continue prompts with a model and its adapter",
    "export": "write a run's result as a PEFT adapter or as a merged model",
    "compare": "scores, settings and answers of runs, trials and studies beside each other",
    "report": "write the page of a study, or serve it while the study runs",
    "study": "living with studies (status, list, show, extend, stop), and experiments with them",
    "profile": "measure steps and record a profiler trace",
    "doctor": "what is installed, which devices there are, what is wrong",
}

_ALL = Commands(
    "jaxtune",
    "jaxtune.cli",
    COMMANDS,
    usage="usage: jaxtune COMMAND CONFIG [key=value ...] [--json] [--dry-run]",
    examples=(
        "jaxtune init quickstart",
        "jaxtune search quickstart.yaml",
        "jaxtune train quickstart.yaml optimizer.learning_rate=3e-3 run_dir=runs/mine",
    ),
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      0 done; 2 the user's input is wrong; 1 anything else.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    make_streams_usable()
    make_home_usable()
    try:
        _check_text(given)
        return _run(given)
    except UserError as error:
        print(f"jaxtune: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe has gone (head, less): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        again = "; what is written stays, and the same command goes on once there is room"
        text = f"{where}{error.strerror or error}{again if error.errno in _NO_ROOM else ''}"
        print(f"jaxtune: {text}", file=sys.stderr)
        return 2 if error.errno in (*_NO_ROOM, *_NO_PLACE) else 1
    except KeyboardInterrupt:
        print("jaxtune: interrupted", file=sys.stderr)
        return 1


def _check_text(given: Sequence[str]) -> None:
    """Refuses words that were not UTF-8: no configuration, report or JSON object could hold them."""
    for word in given:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{word!r} is no UTF-8 text; rename that file or folder, or link to it") from error


def _run(given: list[str]) -> int:
    if given[:1] in (["-V"], ["--version"]):
        from importlib.metadata import version

        print(f"jaxtune {version('jaxtune')}")
        return 0
    return dispatch(_ALL, given)
