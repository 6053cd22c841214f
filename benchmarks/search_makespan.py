"""One study in four ways, from the start of the process to its end: what a search takes, not what a step takes.

The same space, number of trials, steps, model, data, validation set and reference for all; the same examples in each
step. Each way runs in a process of its own, with all cores; ways take turns, medians over the repeats are reported.

- ``population``: jaxtune, several trials in one compiled step;
- ``single``: jaxtune, one trial after another;
- ``peer``: Optuna (TPE, median pruner at the evaluation where jaxtune scores) over PEFT and transformers on torch;
- ``peer_at_fraction``: the same, but every trial stops at the fraction and as many are finished as jaxtune promotes, so
  that early stopping and the engine are told apart.

Where a way's time goes (:mod:`makespan_parts`): start-up, compiling, steps, evaluation, waiting for proposals.
jaxtune's time holds its imports, reading and packing the data, compiling (from an empty cache), checkpoints and the
journal. The peer is given tokens ready made, and its loop is leaner than transformers' own trainer. Settings:

- ``real``: examples of real lengths; jaxtune packs them, the peer pads each batch to its longest;
- ``full``: every example fills its row, so that neither pads.

    python benchmarks/search_makespan.py                        # two settings on CPU, some ten minutes
    python benchmarks/search_makespan.py --preset h200 --json   # a Llama of 1B, random weights, on a GPU
    python benchmarks/search_makespan.py --settings real --model models/smollm2-135m-instruct --promote 2 \
        --trials 8 --steps 40 --examples 8 --repeats 1    # a pretrained model of 135M parameters

Needs the extra ``peers`` and Optuna for the peer; without them its columns stay empty.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import machine
from makespan_parts import PARTS
from makespan_task import PRESETS, ROOT, Setting, prepare
from makespan_ways import WAYS, alone

# By preset: trials, promoted, steps of a whole trial, population, rows of the validation source.
SIZES = {"cpu": (16, 3, 100, 4, 20), "h200": (16, 3, 100, 8, 32), "tiny": (3, 1, 10, 2, 8)}
FRACTION = 0.2
# The untuned model's validation loss in two frameworks: sums of float32, or of bfloat16, in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
# The first finished configuration that is as good as this: at most so much above the best loss of all ways.
WITHIN = 0.01


class WayFailed(Exception):
    """A way's process ended in an error; the text is the end of what it printed."""


def child(way: str, folder: Path, arguments: argparse.Namespace, setting: int) -> dict[str, Any] | None:
    """Runs this file for one way in a process of its own, from an empty compilation cache.

    Raises:
      WayFailed: it did not come to its end.
    """
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--alone", way, "--folder", str(folder), "--setting", str(setting)]
    command += ["--preset", arguments.preset, "--steps", str(arguments.steps), "--trials", str(arguments.trials)]
    command += ["--promote", str(arguments.promote), "--population", str(arguments.population)]
    command += ["--validation", str(arguments.validation)]
    for key in ("model", "examples"):
        command += [] if (value := getattr(arguments, key)) is None else [f"--{key}", str(value)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            # One GPU for either side, where there are more.
            "CUDA_VISIBLE_DEVICES": "0",
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        begin = ["--started", str(time.time())]
        done = subprocess.run(
            command + begin, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    if done.returncode:
        raise WayFailed(done.stderr[-4000:])
    return json.loads(out.read_text()) if out.exists() else None


def measure(setting: Setting, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways of a setting, in turns."""
    ways = [way for way in arguments.ways if setting.with_peer or not way.startswith("peer")]
    missing = [name for name in ("torch", "peft", "optuna") if importlib.util.find_spec(name) is None]
    if missing:
        ways = [way for way in ways if not way.startswith("peer")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            child("prepare", folder, arguments, number)
        except WayFailed as failure:
            return {"failed": {"prepare": str(failure)}}
        described = json.loads((folder / "described.json").read_text())
        failed: dict[str, str] = {}
        if any(way.startswith("peer") for way in ways):
            try:
                described["untuned_loss_peer"] = _same_loss(
                    described["untuned_loss"], folder, arguments, number, setting
                )
            except WayFailed as failure:
                failed["peer_untuned"] = str(failure)
                ways = [way for way in ways if not way.startswith("peer")]
        runs, later = in_turns(ways, arguments.repeats, lambda way: _load_and_run(way, folder, arguments, number))
        failed |= later
    return {"setting": {**vars(setting), **described}, **summarise(runs, arguments.population), "failed": failed}


def in_turns(
    ways: Sequence[str], repeats: int, run: Callable[[str], dict[str, Any]]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Runs all ways, one after another, so many times.

    What one way's failure must not take with it is what the others measured: a way that fails is not run again.

    Returns:
      Of each way its runs, without the failed one; of each way that failed what it printed.
    """
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        # Every other time in reverse, so that no way is always the first.
        for way in ways if repeat % 2 == 0 else reversed(ways):
            if way in failed:
                continue
            print(f"{way}, repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
            try:
                runs[way].append(run(way))
            except WayFailed as failure:
                failed[way] = str(failure)
    return runs, failed


def _load_and_run(way: str, folder: Path, arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    _remove(folder / "run")
    result = child(way, folder, arguments, number)
    assert result is not None
    return {**result, "load_before": load}


def _same_loss(loss: float, folder: Path, arguments: argparse.Namespace, number: int, setting: Setting) -> float:
    """The peer's loss of the untuned model, once it is sure that both measure the same thing.

    Raises:
      WayFailed: they do not.
    """
    result = child("peer_untuned", folder, arguments, number)
    assert result is not None
    other = result["untuned_loss"]
    if abs(loss - other) > TOLERANCE[setting.dtype] * abs(loss):
        raise WayFailed(
            f"{setting.name}: the untuned model's validation loss is {loss:.6f} in jaxtune and {other:.6f} in the "
            "peer: they do not measure the same thing"
        )
    return other


def _remove(directory: Path) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]], population: int) -> dict[str, Any]:
    """Medians over the repeats, and the ratios."""
    finals = [
        event["score"]
        for repeats in runs.values()
        for run in repeats
        for event in run["events"]
        if event["event"] == "finished"
    ]
    goal = min(finals, default=math.inf) * (1 + WITHIN)
    ways = {way: _way(runs[way], goal) if runs.get(way) else None for way in WAYS}
    seconds = {way: found and found["seconds"] for way, found in ways.items()}

    def ratio(other: str, key: str = "seconds") -> float | None:
        ours, theirs = ways["population"], ways[other]
        return theirs[key] / ours[key] if ours and theirs and ours[key] and theirs[key] else None

    single = ways["single"]
    bound = min(population, 1 / single["mfu"]) if single and single["mfu"] else None
    over_single = ratio("single")
    return {
        "seconds": seconds,
        "speedup_over_peer": ratio("peer"),
        "speedup_over_peer_at_fraction": ratio("peer_at_fraction"),
        "speedup_over_single": over_single,
        "speedup_over_peer_to_scored": ratio("peer", "seconds_to_scored"),
        "speedup_over_peer_to_good": ratio("peer", "seconds_to_good"),
        # Full use of the device would make K = 1 faster by 1 / MFU, and K trials do no more work than K times one.
        "bound_over_single": bound,
        "share_of_bound": over_single / bound if over_single and bound else None,
        "good_loss": goal if finals else None,
        "ways": ways,
    }


def _way(runs: Sequence[Mapping[str, Any]], goal: float) -> dict[str, Any]:
    """One way's medians; ``seconds_to_good`` is None unless most repeats got there."""

    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if 2 * len(known) > len(values) else None

    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "seconds_to_scored": median([_scored(run["events"]) for run in runs]),
        "seconds_to_good": median([_good(run["events"], goal) for run in runs]),
        "best_final_loss": median([_best(run["events"]) for run in runs]),
        "cpu_seconds": median([run["cpu_seconds"] for run in runs]),
        "steps_run": median([run["steps_run"] for run in runs]),
        "trials_finished": median([sum(event["event"] == "finished" for event in run["events"]) for run in runs]),
        "compile_seconds": median([run["compile_seconds"] for run in runs]),
        "step_seconds": median([run["step_seconds"] for run in runs]),
        "parts": {part: median([run["parts"][part] for run in runs]) for part in PARTS},
        "mfu": median([run["mfu"] for run in runs]),
        "peak_bytes": median([run["peak_bytes"] for run in runs]),
        "seconds_of_repeats": [run["seconds"] for run in runs],
        "load_before": [run["load_before"] for run in runs],
        "first_run": list(runs[0]["events"]),
    }


def _scored(events: Sequence[Mapping[str, Any]]) -> float:
    """When the last trial had its first score."""
    first: dict[int, float] = {}
    for event in events:
        first.setdefault(event["trial"], event["seconds"])
    return max(first.values())


def _good(events: Sequence[Mapping[str, Any]], goal: float) -> float | None:
    return next((e["seconds"] for e in events if e["event"] == "finished" and e["score"] <= goal), None)


def _best(events: Sequence[Mapping[str, Any]]) -> float | None:
    return min((e["score"] for e in events if e["event"] == "finished"), default=None)


def as_text(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    lines = []
    names = {
        "seconds": ("seconds to the end", 1),
        "seconds_to_scored": ("seconds to all trials scored", 1),
        "seconds_to_good": ("seconds to within 1 % of best", 1),
        "best_final_loss": ("best final loss", 1),
        "cpu_seconds": ("seconds of all cores", 1),
        "steps_run": ("steps run", 1),
        "trials_finished": ("trials finished", 1),
        "step_seconds": ("a step, seconds", 1),
        "peak_bytes": ("peak memory, MiB", 2**20),
    }
    for name, found in result["settings"].items():
        if found is None or "ways" not in found:
            lines += [f"{name:<30}not measured", ""]
            continue
        lines.append(f"{name:<30}" + "".join(f"{way.replace('peer_at_', '@'):>12}" for way in WAYS))
        for key, (label, unit) in names.items():
            digits = {"best_final_loss": 4, "step_seconds": 3}.get(key, 1 if "seconds" in key else 0)
            lines.append(_row(label, [found["ways"][way] and found["ways"][way][key] for way in WAYS], digits, unit))
        for part in PARTS:
            lines.append(_row(f"  {part}, seconds", [_part(found["ways"][way], part) for way in WAYS], 1))
        ratios = {
            "peer": "speedup_over_peer",
            "peer at fraction": "speedup_over_peer_at_fraction",
            "single": "speedup_over_single",
        }
        told = (f"{found[key]:.2f} × {text}" for text, key in ratios.items() if found[key] is not None)
        if ratios_told := ", ".join(told):
            lines.append(f"  population: {ratios_told}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _part(way: Mapping[str, Any] | None, part: str) -> float | None:
    return None if way is None else way["parts"][part]


def _row(label: str, cells: Sequence[float | None], digits: int, unit: float = 1) -> str:
    shown = ("–" if cell is None else f"{cell / unit:,.{digits}f}" for cell in cells)
    return f"  {label:<28}" + "".join(f"{cell:>12}" for cell in shown)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--promote", type=int)
    parser.add_argument("--steps", type=int, help="of a whole trial")
    parser.add_argument("--population", type=int, help="trials in one step")
    parser.add_argument("--validation", type=int, help="rows of the validation source")
    parser.add_argument("--model", help="directory of a pretrained model, instead of the configuration's")
    parser.add_argument("--examples", type=int, help="of a step, on average where they are packed")
    parser.add_argument("--settings", nargs="*", help="names of the preset's settings; all by default")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, in turns")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = zip(("trials", "promote", "steps", "population", "validation"), SIZES[arguments.preset], strict=True)
    for key, value in sizes:
        setattr(arguments, key, getattr(arguments, key) or value)
    settings = [_changed(setting, arguments) for setting in PRESETS[arguments.preset]]
    if arguments.alone:
        _alone(arguments, settings)
        return
    chosen = [setting for setting in settings if arguments.settings is None or setting.name in arguments.settings]
    if not chosen:
        parser.error(f"--settings: the preset has {', '.join(setting.name for setting in settings)}")
    result = report(arguments, {s.name: measure(s, settings.index(s), arguments) for s in chosen})
    print(json.dumps(result) if arguments.json else as_text(result))
    failed = [
        f"{name}: {way} failed:\n{text}"
        for name, one in result["settings"].items()
        if one
        for way, text in one["failed"].items()
    ]
    if failed:
        raise SystemExit("\n".join(failed))


def _changed(setting: Setting, arguments: argparse.Namespace) -> Setting:
    """The setting with what the command line says of it."""
    wanted = {"model": arguments.model, "examples": arguments.examples}
    return dataclasses.replace(setting, **{key: value for key, value in wanted.items() if value is not None})


def report(arguments: argparse.Namespace, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The headline, which is the first setting's; all settings; what it was measured with and on."""
    first = next((one for one in measured.values() if "ways" in one), {})
    headline = ("seconds", *(key for key in first if key.startswith("speedup")), "bound_over_single", "share_of_bound")
    keys = ("preset", "trials", "promote", "steps", "population", "validation", "repeats", "model", "examples")
    packages = ("jax", "jaxlib", "flax", "scikit-optimize", "torch", "transformers", "peft", "optuna")
    return {
        **{key: first.get(key) for key in headline},
        "settings": {
            # A row that was not measured stays, empty.
            setting.name: measured.get(setting.name)
            for setting in PRESETS[arguments.preset]
        },
        "configuration": {**{key: getattr(arguments, key) for key in keys}, "fraction": FRACTION},
        "machine": machine(packages),
    }


def _alone(arguments: argparse.Namespace, settings: Sequence[Setting]) -> None:
    """What a child does."""
    if arguments.alone == "prepare":
        search = {key: getattr(arguments, key) for key in ("trials", "promote", "population")} | {"fraction": FRACTION}
        prepare(settings[arguments.setting], search, arguments.steps, arguments.validation, arguments.folder)
        return
    found = alone(arguments.alone, arguments.folder, arguments.started)
    (arguments.folder / "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
