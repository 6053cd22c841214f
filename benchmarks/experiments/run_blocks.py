"""Runs the blocks of docs/experiments/protocol.md one after another, over as many starts as it takes.

    python benchmarks/experiments/run_blocks.py --model models/smollm2-135m-instruct

What is done is skipped. While a block runs, its journal and its configuration are copied every minute to
``docs/experiments/smollm2/journals``, to be committed; where its run directory is gone, it goes on from those two files
alone. A block that needs the outcome of another one (the winner of C) is made when its turn has come. ``runs.jsonl``
beside the journals tells when what ran, at which commit, and the seconds that it took of the clock and the processors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.signals import stops_handled

TASKS = ("attr_oamine", "slots_restaurant8k")
OUT = Path("docs/experiments/smollm2")
JOURNALS = OUT / "journals"
RUNS = Path("runs/smollm2")
FILES = ("trials.jsonl", "config.yaml")
KEEP_SECONDS = 60

SEARCH_SEEDS = (1, 2, 3)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CEILING_TRIALS = range(8)
FINAL_SEEDS = (11, 12, 13)
SIZE_SEEDS = (21, 22, 23)
ABLATION_SEEDS = (31, 32, 33)
RANDOM_TRIALS, FRACTION, PROMOTE = 16, 0.2, 5


@dataclass(frozen=True)
class Job:
    """One command of a block.

    Attributes:
      name: of its run directory, and of the folder of its journal.
      command: after ``python``, given the job's run directory; made when its turn has come.
      result: the file that is there once it is done.
    """

    name: str
    command: Callable[[Path], list[str]]
    result: Path

    @property
    def run_dir(self) -> Path:
        """Where it works."""
        return RUNS / self.name

    @property
    def journals(self) -> Iterator[tuple[Path, Path]]:
        """Each file that the job can go on from, and where it is kept; a study inside the run directory as well."""
        for folder in ("", "search"):
            for file in FILES:
                yield self.run_dir / folder / file, JOURNALS / self.name / folder / file


def study(
    kind: str,
    task: str,
    name: str,
    *overrides: str,
    file: str | None = None,
    search: str | None = None,
    chosen: Callable[[], Mapping[str, Any]] = dict,
) -> Job:
    """An experiment of ``jaxtune study``.

    Args:
      kind: its name.
      task: of whose configuration.
      name: of the job.
      overrides: of the configuration.
      file: the configuration's name, where it is not the task's.
      search: the job whose winner is ablated.
      chosen: makes further overrides of what earlier blocks have found.
    """
    output = OUT / f"{kind}-{task}"

    def command(run_dir: Path) -> list[str]:
        arguments = [f"study.output={output}", *overrides]
        if search is not None:
            found = RUNS / search
            found.mkdir(parents=True, exist_ok=True)
            for file in (*FILES, "summary.json"):
                shutil.copyfile(JOURNALS / search / file, found / file)
            arguments.append(f"study.ablation.search={found}")
        arguments += [f"{key}={value!r}" for key, value in chosen().items()]
        return ["-m", "jaxtune", "study", kind, config(file or task), f"run_dir={run_dir}", *arguments]

    return Job(name, command, output / "summary.json")


def trials(task: str, name: str, named: Callable[[], Sequence[dict[str, Any]]], *arguments: str) -> Job:
    result = JOURNALS / name / "summary.json"

    def command(run_dir: Path) -> list[str]:
        listed = RUNS / f"{name}.json"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text(json.dumps(named(), indent=2) + "\n", encoding="utf-8")
        given = ["--trials", str(listed), "--output", str(result), *arguments]
        return ["benchmarks/experiments/trials.py", config(task), f"run_dir={run_dir}", *given]

    return Job(name, command, result)


def config(name: str) -> str:
    return f"configs/studies/smollm2/{name}.yaml"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def design(task: str) -> list[dict[str, Any]]:
    """The trials of block A, with their scores."""
    return read(OUT / f"early-score-{task}" / "summary.json")["trials"]


def winner(task: str) -> dict[str, Any]:
    """The configuration that the first search of block C found best."""
    return read(JOURNALS / f"C{SEARCH_SEEDS[0]}-{task}" / "summary.json")["best"]["configuration"]


def chosen_at_random(task: str) -> dict[str, Any]:
    """What the rule of a search (scored at 20 %, five finished) chooses among the first trials of the design."""
    first = [trial for trial in design(task)[:RANDOM_TRIALS] if trial["final_score"] is not None]
    early = sorted(first[1:] if first[0]["id"] == 0 else first, key=lambda trial: trial["scores"][f"{FRACTION:g}"])
    finished = [*(trial for trial in first if trial["id"] == 0), *early[:PROMOTE]]
    return min(finished, key=lambda trial: trial["final_score"])["configuration"]


def best_rate(task: str) -> dict[str, Any]:
    """The configuration of block R with the lowest validation loss."""
    rates = read(JOURNALS / f"R-{task}" / "summary.json")["trials"]
    return min((one for one in rates if one["scores"][-1] is not None), key=lambda one: one["scores"][-1])[
        "configuration"
    ]


def reference(task: str) -> dict[str, Any]:
    return design(task)[0]["configuration"]


def ceiling(task: str) -> list[dict[str, Any]]:
    trials = design(task)
    return [
        {"name": f"trial {number}", "configuration": {**trials[number]["configuration"], "train.seed": 1}}
        for number in CEILING_TRIALS
    ]


def rates(task: str) -> list[dict[str, Any]]:
    return [
        {"name": f"{rate:g}", "configuration": {**reference(task), "optimizer.learning_rate": rate}} for rate in RATES
    ]


def finals(task: str) -> list[dict[str, Any]]:
    arms = {"search": winner, "random": chosen_at_random, "rate": best_rate, "reference": reference}
    return [
        {"name": name, "configuration": {**arm(task), "train.seed": seed}}
        for name, arm in arms.items()
        for seed in FINAL_SEEDS
    ]


def searched(task: str, seed: int) -> Job:
    name = f"C{seed}-{task}"
    overrides = [f"search.seed={seed}", f"train.seed={seed}", "search.finish=[1.0]", "data.test=null"]

    def command(run_dir: Path) -> list[str]:
        return ["-m", "jaxtune", "search", config(task), f"run_dir={run_dir}", *overrides]

    return Job(name, command, JOURNALS / name / "summary.json")


def jobs(blocks: str) -> Iterator[Job]:
    """The jobs of the blocks, in the order in which they run."""
    seeds = {block: f"[{', '.join(map(str, each))}]" for block, each in (("E", SIZE_SEEDS), ("F", ABLATION_SEEDS))}
    for block in blocks:
        for task in TASKS:
            match block:
                case "A":
                    more = ("search.trials=24", "search.metrics=[exact_match]")
                    yield study("early-score", task, f"A-{task}", *more)
                case "B":
                    fractions = ("search.metrics=[exact_match]", "data.test=null", "--fractions", f"{FRACTION}", "1")
                    yield trials(task, f"B-{task}", lambda task=task: ceiling(task), *fractions)
                case "C":
                    yield from (searched(task, seed) for seed in SEARCH_SEEDS)
                case "R":
                    yield trials(task, f"R-{task}", lambda task=task: rates(task), "data.test=null")
                case "D":
                    scored = ("search.objective=exact_match", "data.test={examples: 1000, absent: false}", "--test")
                    yield trials(task, f"D-{task}", lambda task=task: finals(task), *scored)
                case "E":
                    sizes = f"sizes: [0, 50, 200, 650, 1300], seeds: {seeds['E']}, sampling: stratified"
                    more = (
                        f"study.data_size={{unit: examples, {sizes}, score: exact_match, saturation: gap}}",
                        "train.steps=null",
                        "train.epochs=2",
                        "data.test={examples: 1000, absent: false}",
                    )
                    yield study("data-size", task, f"E-{task}", *more, chosen=lambda task=task: winner(task))
                case "F" if task == TASKS[0]:
                    # The search's own seed, in which it may not differ; the repetitions have those of the section.
                    seed = f"train.seed={SEARCH_SEEDS[0]}"
                    more = ("data.test=null", seed, f"study.ablation.seeds={seeds['F']}")
                    yield study("ablation", task, f"F-{task}", *more, search=f"C{SEARCH_SEEDS[0]}-{task}")
                case "M" if task == TASKS[0]:
                    yield study("methods", task, f"M-{task}", file="methods")
                case _:
                    pass


def keep(job: Job) -> None:
    """Copies what the job can go on from; a line that is being written is left for the next time."""
    for there, here in job.journals:
        if not there.exists():
            continue
        data = there.read_bytes()
        whole = data[: data.rfind(b"\n") + 1] if there.suffix == ".jsonl" else data
        if not here.exists() or here.read_bytes() != whole:
            here.parent.mkdir(parents=True, exist_ok=True)
            partial = here.with_name(here.name + ".part")
            partial.write_bytes(whole)
            partial.replace(here)
    summary = job.run_dir / "summary.json"
    if job.result.parent == JOURNALS / job.name and summary.exists():
        shutil.copyfile(summary, job.result)


def restore(job: Job) -> None:
    """Puts back what was kept of a job whose run directory is gone."""
    for there, here in job.journals:
        if here.exists() and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)


def run(job: Job, further: Sequence[str]) -> int:
    """Runs one job, keeps its journal meanwhile, and writes down what it took; its exit status."""
    restore(job)
    command = [sys.executable, *job.command(job.run_dir), *further]
    print(f"-- {job.name}: {' '.join(command)}", flush=True)
    begin, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # In a session of its own it is told to stop once, by this program; it saves its trial and ends by itself.
    process = subprocess.Popen(command, start_new_session=True)
    status = None
    with stops_handled(lambda *_: process.send_signal(signal.SIGTERM)):
        while status is None:
            try:
                status = process.wait(timeout=KEEP_SECONDS)
            except subprocess.TimeoutExpired:
                keep(job)
    keep(job)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    record = {
        "job": job.name,
        "commit": commit,
        "begin": begin,
        "seconds": time.time() - begin,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "load": os.getloadavg()[1],
        "status": status,
        "done": job.result.exists(),
    }
    with (JOURNALS / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if record["done"]:
        # Checkpoints of hundreds of trials; the journal is all that is needed to make one again.
        shutil.rmtree(job.run_dir / "trials", ignore_errors=True)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--blocks", default="ABCRDEFM", help="which, in their order; all if not given")
    parser.add_argument("--override", action="append", default=[], help="dotted.key=value for every job, to try it out")
    arguments = parser.parse_args(argv)
    JOURNALS.mkdir(parents=True, exist_ok=True)
    further = [f"model.path={arguments.model}", *arguments.override]
    for job in jobs(arguments.blocks):
        if job.result.exists():
            print(f"-- {job.name}: done", flush=True)
            continue
        if (status := run(job, further)) or not job.result.exists():
            print(f"-- {job.name}: ended with status {status}; the same command goes on with it", flush=True)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
