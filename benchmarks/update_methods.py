"""What each update method costs, one lever a row: the method, everything else being LoRA's.

Each method of ``configs/methods`` is measured in up to three parts, and each row is on the disk once it is known, so
that the next call goes on where one ended:

- ``counts``: what a step trains and computes, from its trace, at 8B and 0.6B shapes;
- ``memory``: what it needs on 16 TPU v5e chips and on an H200, from their compilers, with neither there;
- ``speed``: on this machine, steps of the method and of LoRA, and PEFT's of the same, each in a process of its own, in
  turns; medians. Nothing else may compute meanwhile.

    python benchmarks/update_methods.py counts memory        # about 20 s a row
    python benchmarks/update_methods.py speed                # about three minutes a method on two cores
    python benchmarks/update_methods.py                      # the tables of what is known
    python benchmarks/update_methods.py speed --methods dora --shape tiny --turns 1 --results /tmp/smoke.json

Needs the extra ``targets`` for the compilers, and ``peers`` for PEFT.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import method_speed
from common import machine
from method_cases import CASES, Method, compiled, counted, methods
from method_tables import tables
from train_step import SHAPES

from jaxtune.cli.common import start_devices
from jaxtune.errors import UserError, nearest

RESULTS = Path(__file__).parent / "results" / "update_methods.json"
PARTS = ("counts", "memory", "speed")
PACKAGES = ("jaxtune", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "torch", "transformers", "peft")

Row = tuple[str, str, Callable[[], dict[str, Any]]]
"""A part, the row's name in it, and what measures it."""


def rows(part: str, chosen: dict[str, Method], arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of a part, LoRA's first."""
    if part == "speed":
        for name in chosen:
            yield part, name, lambda name=name: method_speed.measured(name, arguments)
        return
    shapes = {case.model: key for key, case in reversed(CASES.items())}
    cases = CASES if part == "memory" else {key.partition("-")[0]: CASES[key] for key in shapes.values()}
    for key, case in cases.items():
        for name, method in chosen.items():
            if part == "memory":
                yield part, f"{key}/{name}", lambda n=name, k=key: compiled(n, k, arguments.remat, arguments.timeout)
            else:
                yield part, f"{key}/{name}", lambda m=method, c=case: counted(m, c, arguments.remat)


def measure(arguments: argparse.Namespace, chosen: dict[str, Method]) -> int:
    """Measures what is missing; how many rows failed."""
    failed = 0
    for part in arguments.parts:
        for _, row, measured in rows(part, chosen, arguments):
            report = known(arguments.results)
            setting = settings(part, arguments)
            held = report.setdefault(part, {"setting": setting, "rows": {}})
            if held["setting"] != setting:
                raise UserError(f"{arguments.results}: {part} was measured with {held['setting']}, not {setting}")
            if row in held["rows"] and not arguments.again:
                continue
            begin = time.perf_counter()
            try:
                found = measured()
            except UserError as error:
                print(f"{part} {row}: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            held["rows"][row] = found
            held["machine"] = machine(PACKAGES)
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            arguments.results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"{part} {row}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return failed


def settings(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a part have in common."""
    if part == "speed":
        return {key: getattr(arguments, key) for key in ("shape", "batch", "length", "turns", "steps", "warmup")}
    cases = {key: {"target": case.target, "rows": case.rows, "length": case.length} for key, case in CASES.items()}
    return {"remat": arguments.remat, "cases": cases}


def known(file: Path) -> dict[str, Any]:
    """What has been measured."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def main(given: list[str] | None = None) -> int:
    """Measures what is asked for, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what is measured: {', '.join(PARTS)}; nothing")
    parser.add_argument("--methods", help="names, with commas between; all of configs/methods")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a JSON file to write to, and to go on with")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots", help="of counts and memory")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one compilation")
    parser.add_argument("--shape", choices=SHAPES, default="30m", help="of speed, as the following")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn, which do not count")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args(given)
    start_devices()
    try:
        every = methods()
        wanted = list(every) if arguments.methods is None else arguments.methods.split(",")
        for kind, names, valid in (("part", arguments.parts, PARTS), ("method", wanted, tuple(every))):
            for name in names:
                if name not in valid:
                    raise UserError(f"there is no {kind} {name!r}{nearest(name, valid)}")
        failed = measure(arguments, {name: every[name] for name in wanted})
    except UserError as error:
        parser.error(str(error))
    report = known(arguments.results)
    print(json.dumps(report) if arguments.json else tables(report))
    return 1 if failed else 0


if __name__ == "__main__":
    # Told to end, it ends the compiler, or the sides, that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
