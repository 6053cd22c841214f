"""``jaxtune report``."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from jaxtune.cli.common import add_json_argument, emit, path_argument, say
from jaxtune.errors import UserError
from jaxtune.signals import stops_handled

EXAMPLE = "jaxtune report runs/quickstart --serve"

_LOOKS_SECONDS = 0.5
"""How often a server looks whether it was asked to end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "run",
        metavar="RUN_DIR|CONFIG",
        type=path_argument,
        help="a study's directory, or the YAML file it was started with",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, when a YAML file is given")
    add_json_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="check that there is a study; write nothing")
    serving = parser.add_argument_group("a page that follows a running study")
    serving.add_argument("--serve", action="store_true", help="serve the page instead of writing it, until Ctrl-C")
    serving.add_argument("--port", type=int, metavar="N", help="default: 8808, or a free one; 0: any free one")
    serving.add_argument("--host", metavar="H", help="interface to listen on; default: this machine alone can read")
    serving.add_argument("--public", action="store_true", help="allow a --host that other machines can reach")


def run(arguments: argparse.Namespace) -> int:
    """Writes ``report.html`` from a study's files alone, or serves it."""
    if not arguments.serve:
        for option in ("port", "host", "public"):
            given = getattr(arguments, option)
            if given is not None and given is not False:  # port 0 is given
                raise UserError(f"--{option}: only goes with --serve")
    directory = _directory(arguments)

    from jaxtune.reports import read_study, write_report

    if arguments.dry_run:
        read_study(directory)
        emit({"checked": True, "run_dir": str(directory)}, arguments.json, f"{directory} holds a study")
        return 0
    if arguments.serve:
        return _serve(directory, arguments)
    path = write_report(directory)
    emit({"report": str(path)}, arguments.json, f"report in {path}")
    return 0


def _directory(arguments: argparse.Namespace) -> Path:
    from jaxtune.config import load_config

    given = Path(arguments.run)
    # A page can be opened before its study begins, so the directory need not be there.
    coming = arguments.serve and not given.exists() and given.suffix not in (".yaml", ".yml")
    if given.is_dir() or coming:
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]}: overrides go with a YAML file, not with a directory")
        return given
    return Path(load_config(given, arguments.overrides).directory)


def _serve(directory: Path, arguments: argparse.Namespace) -> int:
    from jaxtune.reports import read_study
    from jaxtune.reports.server import make_server

    # What is asked for to end it, Ctrl-C or a plain kill, is no failure. What a signal raises is lost where it comes
    # while Python collects garbage; what it sets is not.
    asked_to_end = threading.Event()
    with (
        stops_handled(lambda *_: asked_to_end.set()),
        make_server(
            directory, host=arguments.host or "127.0.0.1", port=arguments.port, public=arguments.public
        ) as server,
    ):
        try:
            read_study(directory)
        except UserError as error:
            say(f"{error}\nthe page shows the study as soon as it can be read")
        emit(
            {"url": server.url, "port": server.port, "run_dir": str(directory)},
            arguments.json,
            f"the page of {directory}: {server.url}   (Ctrl-C ends it; the study is not touched)",
        )
        server.timeout = _LOOKS_SECONDS
        while not asked_to_end.is_set():
            server.handle_request()
        say("the page is no longer served")
    return 0
