"""Path patterns of update rules.

A path names one array of one layer, ``layers.7.attention.q.kernel``. In a pattern

- ``*`` stands for any characters within one part: ``layers.*.mlp``, ``layers.*.*_norm``;
- ``**`` for any number of whole parts, none included: ``**.bias``;
- ``{a,b}`` for one of several alternatives, which may hold dots and ``*``: ``{attention.q,mlp.*}``;
- ``{0..7}`` for one of the numbers from 0 to 7; ``{-4..-1}`` are the last four layers.

A pattern that matches a module covers everything in it: ``layers.*.attention.q`` has both kernel and bias.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from functools import cached_property

from jaxtune.errors import UserError

_TOKEN = re.compile(r"(?P<any>\*\*)|(?P<star>\*)|(?P<dot>\.)|(?P<group>\{[^{}]*\})|(?P<word>-\d+|\w+)", re.ASCII)
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_LONGEST_RANGE = 10_000


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A path pattern.

    Attributes:
      text: as the user wrote it.

    Raises:
      UserError: it is malformed.
    """

    text: str

    def __post_init__(self) -> None:
        _ = self._regex

    def matches(self, path: str) -> bool:
        """Whether the pattern matches ``path`` or a module that holds it."""
        return self._regex.fullmatch(path) is not None

    @cached_property
    def alternatives(self) -> tuple[Pattern, ...]:
        """The patterns that ``{a,b}`` stands for, one for each choice; number ranges are left as they are."""
        pieces = re.split(r"(\{[^{}]*\})", self.text)
        choices = [
            piece[1:-1].split(",") if piece.startswith("{") and not _RANGE.fullmatch(piece[1:-1]) else [piece]
            for piece in pieces
        ]
        return tuple(Pattern("".join(choice)) for choice in itertools.product(*choices))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        # A part may end a module, of which the pattern then covers everything: hence the open end.
        return re.compile(f"(?:{self._translated(self.text, in_braces=False)})(?:\\..*)?")

    def _translated(self, text: str, in_braces: bool) -> str:
        """A regular expression for a whole pattern, or for one alternative."""
        tokens = self._tokens(text)
        kinds = ["dot", *(kind for kind, _ in tokens), "dot"]
        if any(pair == ("dot", "dot") for pair in itertools.pairwise(kinds)):
            raise self._malformed("has an empty part")
        result = ""
        for index, (kind, value) in enumerate(tokens):
            if kind != "any":
                skipped = kind == "dot" and index > 0 and tokens[index - 1][0] == "any"
                result += "" if skipped else self._piece(kind, value)
                continue
            if in_braces or kinds[index] != "dot" or kinds[index + 2] != "dot":
                raise self._malformed("has '**' beside other characters; it stands for whole parts, between dots")
            last = index == len(tokens) - 1
            if not last:
                result += r"(?:[^.]+\.)*"  # with its own dots: the one that follows is skipped
            elif result.endswith(r"\."):
                result = result.removesuffix(r"\.") + r"(?:\.[^.]+)*"
            else:
                result += ".*"
        return result

    def _piece(self, kind: str, value: str) -> str:
        if kind == "star":
            return "[^.]*"
        if kind != "group":
            return re.escape(value)
        inside = value[1:-1]
        numbers = _RANGE.fullmatch(inside)
        if numbers is None:
            return f"(?:{'|'.join(self._translated(choice, in_braces=True) for choice in inside.split(','))})"
        low, high = int(numbers[1]), int(numbers[2])
        if not low <= high < low + _LONGEST_RANGE:
            raise self._malformed(f"has the range {value}, which is empty or longer than {_LONGEST_RANGE}")
        return f"(?:{'|'.join(str(number) for number in range(low, high + 1))})"

    def _tokens(self, text: str) -> list[tuple[str, str]]:
        tokens, position = [], 0
        while position < len(text):
            found = _TOKEN.match(text, position)
            if found is None:
                raise self._malformed(f"cannot be read from {text[position:]!r} on")
            tokens.append((str(found.lastgroup), found[0]))
            position = found.end()
        return tokens

    def _malformed(self, reason: str) -> UserError:
        example = "write 'layers.*.attention.{q,v}' or 'layers.{0..3}.**'"
        return UserError(f"pattern {self.text!r} {reason}; {example}")


def pattern_of(paths: Sequence[str], layers: tuple[int, ...], count: int) -> str:
    """A pattern for modules in some layers of so many: ``layers.{0,2}.{attention.q,mlp.up}``.

    Args:
      paths: of stacks, ``layers.attention.q``.
      layers: their numbers; none for what is not stacked.
      count: of all layers.
    """
    if not layers:
        return _braced(paths)
    where = "*" if len(layers) == count else _braced([str(layer) for layer in layers])
    return f"layers.{where}.{_braced([path.removeprefix('layers.') for path in paths])}"


def _braced(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else "{" + ",".join(choices) + "}"
