"""``jaxtune study stop``."""

from __future__ import annotations

import argparse

from jaxtune.cli.common import add_json_argument, emit, path_argument, say
from jaxtune.errors import UserError
from jaxtune.layout import RunFiles

EXAMPLE = "jaxtune study stop runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=path_argument, help="a study's directory")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=600.0, help="how long to wait for its end (default: 600)"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Asks the process that runs a study to save and end, and waits until it has."""
    from jaxtune.search.stopping import stop_study

    if not arguments.timeout >= 0:
        raise UserError(f"argument --timeout: {arguments.timeout} is no time to wait; give seconds, 0 or more")
    holder, stopped = stop_study(
        arguments.run_dir,
        timeout=arguments.timeout,
        on_asked=lambda holder: say(f"asked {holder.text} to stop; it saves the trials under way first"),
    )
    files = RunFiles(arguments.run_dir)
    over = files.summary_path.is_file()
    again = "it is finished" if over else f"to go on: jaxtune search {files.config_path}"
    result = {"run_dir": arguments.run_dir, "was_running": None if holder is None else holder.text, "stopped": stopped}
    if holder is None:
        text = f"nobody runs {arguments.run_dir}; {again}"
    elif stopped:
        text = f"stopped; {again}"
    else:
        text = f"{holder.text} was asked to stop and has not ended yet; jaxtune study status {arguments.run_dir} tells"
    emit(result, arguments.json, text)
    return 0 if stopped else 1
