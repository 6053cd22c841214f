"""From words to a command: a table of commands, of which one may hold a table of its own."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxtune.errors import UserError, nearest


class _StoreOnce(argparse.Action):
    """Keeps the value of an option, which is given once: of two, whoever typed them expects something of each."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Called by argparse for each value."""
        assert isinstance(parser, Parser)
        if option_string is not None and self.dest in parser.stored:
            raise argparse.ArgumentError(self, "given twice")
        parser.stored.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one message with the nearest valid choice."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.stored: set[str] = set()
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)

    def error(self, message: str) -> NoReturn:
        """Raises :class:`UserError` instead of printing the whole usage."""
        # Optional words count as missing too where argparse lists them.
        message = message.removesuffix(", key=value")
        if unknown := re.match(r"unrecognized arguments: (--?[\w-]+)", message):
            message += nearest(unknown[1], self._option_string_actions)
        if wrong := re.match(r"(argument .*: invalid choice: '(.*)') \(choose from (.*)\)", message):
            message = wrong[1] + nearest(wrong[2], re.findall(r"'([^']*)'", wrong[3]))
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclasses.dataclass(frozen=True)
class Commands:
    """A table of commands.

    Attributes:
      program: the words before a command: ``jaxtune``.
      package: where their modules are: command ``early-score`` is the module ``early_score``. A module has ``EXAMPLE``,
        ``add_arguments(parser)`` and ``run(arguments) -> exit code``; or, where a command is a table itself, ``GROUP``.
      texts: command -> what it does, in a phrase.
      usage: the first line of the overview.
      examples: the last lines of the overview.
    """

    program: str
    package: str
    texts: Mapping[str, str]
    usage: str
    examples: tuple[str, ...]

    def overview(self) -> str:
        """What ``--help`` without a command prints."""
        width = max(map(len, self.texts))
        listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in self.texts.items())
        examples = "\n".join(f"  {line}" for line in (*self.examples, f"{self.program} COMMAND --help"))
        return f"{self.usage}\n\ncommands:\n{listed}\n\nexamples:\n{examples}"


def dispatch(commands: Commands, given: Sequence[str]) -> int:
    """Runs the command that the words name.

    Returns:
      Its exit code.

    Raises:
      UserError: there is no such command, or its arguments are wrong.
    """
    if not given or given[0] in ("-h", "--help"):
        print(commands.overview())
        return 0
    name = given[0]
    if name not in commands.texts:
        kind = "command" if " " not in commands.program else f"command of {commands.program}"
        raise UserError(f"unknown {kind} {name!r}{nearest(name, commands.texts)}")
    # Only the chosen command's module is imported: help answers at once.
    command = importlib.import_module(f"{commands.package}.{name.replace('-', '_')}")
    group: Commands | None = getattr(command, "GROUP", None)
    if group is not None:
        return dispatch(group, given[1:])
    text = commands.texts[name]
    parser = Parser(
        prog=f"{commands.program} {name}",
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return command.run(parser.parse_intermixed_args(given[1:]))
