"""Kills a run and a study at twenty places and goes on: arrays, scores and proposals are those of undisturbed ones.

    python tests/kill_anywhere.py [STRIDE]

With a STRIDE only every STRIDE-th place is tried.

A place is a call of the product (a checkpoint is saved, a journal record is written, a batch is evaluated, an adapter
is exported) and a moment: before it, inside it, after it. The process is killed there with SIGKILL, the same command is
started again, and what it leaves is compared, without times. It takes minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A moment inside a call that has no seam of its own, in seconds after it began.
_INSIDE = 0.01

CONFIG = """
name: killed
model: {path: "jaxtune:nano"}
data:
  {train: train.jsonl, validation: validation.jsonl, test: validation.jsonl, prompt: "{question}\\n",
   completion: "{answer}"}
train: {steps: 9, batch_size: 4, sequence_length: 64, evaluate_every: 3, log_every: 1}
optimizer: {learning_rate: 3.0e-3}
evaluation: {task: extraction, max_new_tokens: 4}
"""
SEARCH = """
search:
  trials: 6
  promote: 2
  fraction: 0.34
  initial: 3
  space:
    optimizer.learning_rate: {log_uniform: [1.0e-4, 3.0e-2]}
    update.0.rank: {power_of_two: [4, 16]}
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process is killed.

    Attributes:
      command: ``train`` or ``search``.
      what: the call.
      when: ``before``, ``in`` or ``after`` it.
      count: at which of the calls.
    """

    command: str
    what: str
    when: str
    count: int


PLACES = [
    *(Place("train", "checkpoint", when, count) for when in ("before", "in", "after") for count in (1, 2)),
    *(Place("train", "evaluation", when, 2) for when in ("before", "in", "after")),
    *(Place("train", "export", when, 1) for when in ("before", "in", "after")),
    *(Place("search", "record", when, count) for when, count in (("before", 5), ("in", 8), ("after", 11))),
    *(Place("search", "record", when, 14) for when in ("in",)),
    *(Place("search", "checkpoint", when, count) for when, count in (("before", 3), ("in", 5), ("after", 6))),
    Place("search", "evaluation", "in", 4),
]


def kill() -> None:
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def wrapped(function: Callable[..., Any], place: Place, inside: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``function`` that kills the process at its ``place.count``-th call.

    Args:
      function: called as before at all other calls.
      place: the moment.
      inside: what the call does until it is killed inside; else it is killed a moment after it began.
    """
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != place.count:
            return function(*arguments, **options)
        if place.when == "before":
            kill()
        if place.when == "in":
            if inside is not None:
                inside(*arguments, **options)
                kill()
            threading.Timer(_INSIDE, kill).start()
        result = function(*arguments, **options)
        if place.when == "after":
            kill()
        if place.when == "in":
            time.sleep(60)
        return result

    return call


def arm(place: Place) -> None:
    """Makes this process be killed at a place."""
    from jaxtune.search.journal import Journal
    from jaxtune.training.checkpoints import Checkpoints
    from jaxtune.training.trainer import Trainer
    from jaxtune.updates.peft import export as peft_export

    if place.what == "checkpoint":
        save = Checkpoints.save

        def save_and_wait(self: Checkpoints, *arguments: Any, **options: Any) -> None:
            save(self, *arguments, **options)
            if place.when == "after":
                self.wait()

        Checkpoints.save = wrapped(save_and_wait, place)
    elif place.what == "record":
        append = Journal.append

        def half(self: Journal, event: str, **fields: Any) -> None:
            whole = self.path.stat().st_size
            append(self, event, **fields)
            os.truncate(self.path, (whole + self.path.stat().st_size) // 2)

        Journal.append = wrapped(append, place, half)
    elif place.what == "evaluation":
        Trainer.evaluate = wrapped(Trainer.evaluate, place)
    else:
        peft_export.write_tensors = wrapped(peft_export.write_tensors, place)


def run(command: str, folder: Path, place: Place | None = None) -> int:
    """Runs the command in a process of its own; its exit status as :func:`os.waitpid` gives it."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from jaxtune.cli import main

        if place is not None:
            arm(place)
        code = main([command, f"{command}.yaml", "run_dir=run"])
    except BaseException as error:
        print(repr(error), flush=True)
    os._exit(code)


def prepare(folder: Path) -> Path:
    """A folder with the data and both configurations."""
    folder.mkdir()
    for name, numbers in (("train", range(40)), ("validation", range(40, 56))):
        rows = [
            {"question": f"the color of item {n} is red{n % 7}. color:", "answer": f" red{n % 7}", "attribute": "color"}
            for n in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.yaml").write_text(CONFIG)
    (folder / "search.yaml").write_text(CONFIG + SEARCH)
    return folder


_TIMES = ("time", "seconds", "peak_device_bytes", "run_dir")


def timeless(value: Any) -> Any:
    """Without times, the memory that a process took, and the name of the place."""
    if isinstance(value, dict):
        return {
            key: timeless(item)
            for key, item in value.items()
            if key not in _TIMES and not key.endswith(("_per_second", "_seconds"))
        }
    return [timeless(item) for item in value] if isinstance(value, list) else value


def left(folder: Path) -> Iterator[tuple[str, Any]]:
    """What a finished command left: files without times, arrays of checkpoints."""
    import numpy as np
    import orbax.checkpoint as ocp

    directory = folder / "run"
    for name in ("summary.json", "trials.jsonl", "metrics.jsonl"):
        if (directory / name).exists():
            yield name, [timeless(json.loads(line)) for line in _documents(directory / name)]
    for file in sorted(directory.rglob("adapter_model.safetensors")):
        yield str(file.relative_to(folder)), file.read_bytes()
    for state in sorted(directory.rglob("checkpoints/*/state")):
        restored = ocp.StandardCheckpointer().restore(state.absolute())
        import jax

        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            yield f"{state.relative_to(folder)}{jax.tree_util.keystr(path)}", np.asarray(leaf).tobytes()


def _documents(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]


def compare(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs: its name, and of a JSON file the first difference."""
    from jaxtune.search.journal import difference

    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [f"{name}: {difference({'': expected.get(name)}, {'': found.get(name)})}" for name in names]


def reread(folder: Path) -> dict[str, Any]:
    """:func:`left`, read by a process of its own: this one must stay without a device, to be forked."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        import hashlib

        digests = {
            name: hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value
            for name, value in left(folder)
        }
        with os.fdopen(write, "w") as pipe:
            json.dump(digests, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        digests = json.load(pipe)
    os.waitpid(process, 0)
    return digests


def main() -> int:
    """Prints a line for each place; 1 if anything differs."""
    import jaxtune.cli.search
    import jaxtune.search.run
    import jaxtune.training.run  # noqa: F401

    failed = 0
    with tempfile.TemporaryDirectory() as top:
        undisturbed: dict[str, dict[str, Any]] = {}
        for command in ("train", "search"):
            folder = prepare(Path(top) / command)
            if run(command, folder) != 0:
                print((folder / "log").read_text())
                return 1
            undisturbed[command] = reread(folder)
            print(f"{command}: undisturbed, {len(undisturbed[command])} files and arrays", flush=True)
        places = PLACES[:: int(sys.argv[1]) if len(sys.argv) > 1 else 1]
        for number, place in enumerate(places):
            folder = prepare(Path(top) / str(number))
            killed = os.WTERMSIG(run(place.command, folder, place)) == signal.SIGKILL
            code = os.waitstatus_to_exitcode(run(place.command, folder))
            different = compare(undisturbed[place.command], reread(folder)) if code == 0 else ["it did not go on"]
            wrong = not killed or bool(different)
            failed += wrong
            text = f"killed {place.when} {place.what} {place.count}" if killed else "was NOT killed"
            print(f"{place.command:6} {text}: {', '.join(different) or 'the same'}", flush=True)
            if wrong:
                with contextlib.suppress(OSError):
                    print((folder / "log").read_text()[-3000:])
    print(f"{len(places)} kills, {failed} with a difference")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
