"""Every command that the documentation shows is one, and runs somewhere or has its reason."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxtune.cli import _ALL
from jaxtune.cli.dispatch import Parser
from jaxtune.config import load_config
from jaxtune.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LISTED: dict[str, dict[str, list[str]]] = yaml.safe_load(
    (ROOT / "tests/documented_commands.yaml").read_text(encoding="utf-8")
)
_PAGES = ("README.md", "CONTRIBUTING.md", "kernels/README.md", "docs/experiments/README.md")
_PROGRAMS = "jaxtune|make|python|pip|ray|ssh|mv|cp|export|git|pytest"
_OVERRIDE = re.compile(r"[\w.]+=")


def shown() -> dict[str, list[str]]:
    """The commands of each page without their remarks: lines of code, code within text, comments of configurations.

    Words that only name a command (``jaxtune search``) are not one to run.
    """
    found: dict[str, list[str]] = {}
    pages = [*(ROOT / page for page in _PAGES), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".yaml":
            lines = re.findall(rf"^#   +((?:{_PROGRAMS}) .*)$", text, flags=re.MULTILINE)
        else:
            text = re.sub(r"^( *)```(?:python|yaml|text)\n.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
            fenced = "".join(re.findall(r"^```(?:sh|bash|shell|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
            lines = re.findall(rf"^ +((?:{_PROGRAMS}) .*)$", text, flags=re.MULTILINE)
            lines += re.findall(rf"^((?:{_PROGRAMS}) .*)$", fenced, flags=re.MULTILINE)
            lines += re.findall(rf"`((?:{_PROGRAMS}) [^`]*)`", text)
        commands = (" ".join(re.split(r"\s+#\s", line)[0].split()) for line in lines)
        found[str(page.relative_to(ROOT))] = [command for command in commands if not _only_named(command)]
    return found


def _only_named(command: str) -> bool:
    words = command.split()
    if words == ["pip", "install"]:
        return True
    return words[0] == "jaxtune" and " ".join(words) != "jaxtune init" and " ".join(words) != "jaxtune doctor" and (
        words[1:] == ["study"] or (len(words) == 2 or (len(words) == 3 and words[1] == "study"))
    )  # fmt: skip


def arguments_of(words: list[str]) -> Any:
    """What the program's own parser makes of a command, or its error."""
    commands, given = _ALL, words[1:]
    while True:
        assert given[0] in commands.texts, given[0]
        module = importlib.import_module(f"{commands.package}.{given[0].replace('-', '_')}")
        given = given[1:]
        if (group := getattr(module, "GROUP", None)) is None:
            break
        commands = group
    parser = Parser(prog=" ".join(words[:2]), allow_abbrev=False)
    module.add_arguments(parser)
    return parser.parse_intermixed_args(given)


def check(command: str) -> None:
    """That a command could be started as it stands: its program, its arguments, its files and its keys are there.

    Raises:
      UserError, AssertionError: it could not.
    """
    words = shlex.split(command)
    if words[0] == "jaxtune":
        arguments_of(words)
        files = [word for word in words if word.startswith("configs/")]
        assert all((ROOT / file).is_file() for file in files), command
        # A value for --add or --fix is one like those of the other overrides.
        keys = [part for word in words[1:] if _OVERRIDE.match(word) for part in re.split(r",(?=[\w.]+=)", word)]
        load_config(str(ROOT / (files[0] if files else "configs/quickstart.yaml")), keys)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert words[1] in targets, command
        for place in re.findall(r"tests[\w/.]*", command):
            assert (ROOT / place).exists(), command
    elif words[0] == "python" and words[1] != "-m":
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in script for word in words if word.startswith("--")), command
    elif words[0] == "python":
        assert importlib.util.find_spec(words[2]), command
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        asked = [extra for word in words for extra in ",".join(re.findall(r"\[(.*)\]", word)).split(",") if extra]
        assert set(asked) <= set(extras), command


@pytest.mark.parametrize("page", sorted(shown()))
def test_commands_are_what_the_program_takes(page):
    for command in shown()[page]:
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        "jaxtune serach my.yaml",
        "jaxtune search my.yaml --dryrun",
        "jaxtune export runs/my",
        "jaxtune search my.yaml search.trails=3",
        "jaxtune study extend runs/my --fix optimizer.lr=1",
        "jaxtune train configs/missing.yaml",
        "make tests",
        "make test PYTEST_ARGS='tests/date'",
        "python benchmarks/surrogates.py --figure x",
        "pip install 'jaxtune[optunas]'",
    ],
)
def test_a_command_that_would_fail_is_found(command):
    with pytest.raises((UserError, AssertionError)):
        check(command)


def test_every_command_runs_somewhere_or_has_its_reason():
    listed = [command for entries in LISTED.values() for commands in entries.values() for command in commands]
    assert not [command for command, count in Counter(listed).items() if count > 1]
    commands = {command: page for page, commands in shown().items() for command in commands}
    assert len(commands) > 50
    missing = {command: page for command, page in commands.items() if command not in listed}
    assert not missing, "tests/documented_commands.yaml says neither what runs these nor why nothing does"
    assert not set(listed) - set(commands), "no page shows these any more"


def test_what_is_said_to_run_them_exists():
    for place in LISTED["run"]:
        file, _, test = place.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"\ndef {test}(" in text, place
    for command in LISTED["run"][".ci/run"]:
        assert f"\n{command}\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
