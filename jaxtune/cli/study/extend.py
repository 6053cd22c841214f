"""``jaxtune study extend``."""

from __future__ import annotations

import argparse

from jaxtune.cli.common import add_data_argument, add_json_argument, emit, path_argument, say, start_devices
from jaxtune.errors import UserError
from jaxtune.layout import RunFiles

EXAMPLE = (
    "jaxtune study extend runs/quickstart search.trials=24 search.promote=6 \\\n"
    "      --add optimizer.learning_rate=3e-3,update.0.rank=8 --fix optimizer.warmup=0.1"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=path_argument, help="a study's directory; nobody may be running it"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="search.trials=N (in all), search.promote=N")
    parser.add_argument(
        "--add",
        metavar="key=value,key=value",
        action="append",
        default=[],
        help="a configuration to try next; what it does not name is as in the configuration. May be repeated",
    )
    parser.add_argument(
        "--fix",
        metavar="key=value",
        action="append",
        default=[],
        help="a searched value that later trials do not vary any more. May be repeated",
    )
    parser.add_argument("--free", metavar="key", action="append", default=[], help="vary a fixed value again")
    parser.add_argument("--no-run", action="store_true", help="change the study, and do not go on with it")
    parser.add_argument("--dry-run", action="store_true", help="check the change; write nothing")
    add_data_argument(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Changes a study, then goes on with it."""
    start_devices()

    from jaxtune.search.extend import extend, parse_assignments

    fixed: dict[str, object] = {}
    for text in arguments.fix:
        for key, value in parse_assignments(text, "--fix").items():
            if key in fixed:
                raise UserError(f"--fix {key}: given twice")
            fixed[key] = value
    extension = extend(
        arguments.run_dir,
        arguments.overrides,
        added=[parse_assignments(text, "--add") for text in arguments.add],
        fixed=fixed,
        freed=arguments.free,
        write=not arguments.dry_run,
        accept_changed_data=arguments.accept_changed_data,
    )
    changes = [f"search.{name} is now {value}" for name, value in extension.changed.items()]
    changes += [
        f"trial {number}: {', '.join(f'{key}={value}' for key, value in configuration.items())}"
        for number, configuration in extension.added.items()
    ]
    if arguments.no_run or arguments.dry_run:
        again = "nothing is written" if arguments.dry_run else f"to go on: {_again(arguments.run_dir)}"
        result = {
            "run_dir": arguments.run_dir,
            "changed": extension.changed,
            "added": {str(number): configuration for number, configuration in extension.added.items()},
            "to_score": extension.left,
            "written": not arguments.dry_run,
        }
        lines = [*(changes or ["nothing changes"]), f"{extension.left} trials to score; {again}"]
        emit(result, arguments.json, "\n".join(lines))
        return 0
    for line in changes:
        say(line)

    from jaxtune.cli.search import run_study

    return run_study(extension.config, as_json=arguments.json, accept_changed_data=arguments.accept_changed_data)


def _again(run_dir: str) -> str:
    return f"jaxtune search {RunFiles(run_dir).config_path}"
