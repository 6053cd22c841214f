"""The ``jaxtune`` command: finds the subcommand, turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxtune.errors import UserError, nearest

COMMANDS = {
    "search": "find the configuration worth finishing among many short trials",
    "train": "train one configuration",
    "plan": "what a configuration trains, computes and needs in memory",
    "evaluate": "score a trained run, or the untuned model, on a split",
    "generate": "continue prompts with a model and its adapter",
    "export": "write a run's result as a PEFT adapter or as a merged model",
    "report": "write the page of a study, or serve it while the study runs",
    "profile": "measure steps and record a profiler trace",
    "doctor": "what is installed, which devices there are, what is wrong",
}

_EXAMPLE = """examples:
  jaxtune search configs/quickstart.yaml
  jaxtune train my.yaml optimizer.learning_rate=3e-4 train.steps=500
  jaxtune COMMAND --help"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one message with the nearest valid choice."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`UserError` instead of printing the whole usage."""
        # Optional words count as missing too where argparse lists them.
        message = message.removesuffix(", key=value")
        if unknown := re.match(r"unrecognized arguments: (--?[\w-]+)", message):
            message += nearest(unknown[1], self._option_string_actions)
        if wrong := re.match(r"(argument .*: invalid choice: '(.*)') \(choose from (.*)\)", message):
            message = wrong[1] + nearest(wrong[2], re.findall(r"'([^']*)'", wrong[3]))
        raise UserError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      0 done; 2 the user's input is wrong; 1 anything else.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except UserError as error:
        print(f"jaxtune: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe has gone (head, less): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        again = "; what is written stays, and the same command goes on once there is room"
        print(f"jaxtune: {error}{again if error.errno == errno.ENOSPC else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxtune: interrupted", file=sys.stderr)
        return 1


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"jaxtune {version('jaxtune')}")
        return 0
    name = given[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    # Only the chosen command's module is imported: help answers at once.
    command = importlib.import_module(f"jaxtune.cli.{name}")
    parser = Parser(
        prog=f"jaxtune {name}",
        description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.",
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return command.run(parser.parse_intermixed_args(given[1:]))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"usage: jaxtune COMMAND CONFIG [key=value ...] [--json] [--dry-run]\n\ncommands:\n{listed}\n\n{_EXAMPLE}"
