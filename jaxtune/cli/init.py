"""``jaxtune init``."""

from __future__ import annotations

import argparse

from jaxtune.cli.common import add_json_argument, emit, table

EXAMPLE = "jaxtune init quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="which one; without it all are listed")
    parser.add_argument("file", metavar="FILE", nargs="?", help="the copy's name, and the study's; NAME.yaml if unset")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Lists the packaged configurations, or copies one into the working directory; nothing is overwritten."""
    from jaxtune.config.packaged import copy_config, packaged_configs

    if arguments.name is None:
        rows = [{"name": name, "for": purpose} for name, purpose in packaged_configs().items()]
        emit({"configurations": rows}, arguments.json, f"{table(rows)}\n\nto copy one: jaxtune init NAME")
        return 0
    copied = copy_config(arguments.name, arguments.file)
    result = {
        "config": str(copied.config),
        "written": [str(path) for path in copied.written],
        "kept": [str(path) for path in copied.kept],
        "to_set": copied.to_set,
        "next": [f"{copied.command} --dry-run", copied.command],
    }
    lines = [f"{path}: written" for path in result["written"]]
    lines += [f"{path}: was there already, the same" for path in result["kept"]]
    if copied.to_set:
        lines += [f"to set in {copied.config}, as there is nothing there:"]
        lines += [f"  {key}: {path}" for key, path in copied.to_set.items()]
    first, then = result["next"]
    lines += [f"next: {first}", f"then: {then}"]
    emit(result, arguments.json, "\n".join(lines))
    return 0
