"""What a study of a model of 135M parameters takes on one H200: two calls of at most five minutes each.

    python benchmarks/h200.py --model models/smollm2-135m-instruct --data data/slots_restaurant8k --out out --call 1
    python benchmarks/h200.py --model models/smollm2-135m-instruct --data data/slots_restaurant8k --out out --call 2

The first call compiles and times the step of populations of 1, 4, 8 and 16 trials and trains a design of 64
configurations, sixteen at a time. The second trains slots at 200 to 29,670 examples, three seeds each, as one
population. Weights are random unless the model's directory has some, as times do not depend on them. Every figure is a
line of ``journal.jsonl``, on the disk before the next is measured; called again, what is there is skipped, and the
second call goes on from its last saved states. It ends by itself when its seconds are over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.config import Config, hyperparameters, load_config
from jaxtune.data import train_batches
from jaxtune.data.pipeline import steps_of_epochs
from jaxtune.experiments.early_score import design
from jaxtune.experiments.sampling import read_documents, sampling_order
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.telemetry.environment import machine
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.population import Population

POPULATIONS = (1, 4, 8, 16)
STEPS, TIMED = 64, 20
CONFIGURATIONS = 64
SIZES = (200, 650, 1300, 2600, 6500, 13000, 29670)
SEEDS = (21, 22, 23)
EPOCHS, ROWS = 2, 4
SAVE_SECONDS = 45


class Journal:
    """Figures by name, each on the disk as soon as it is known.

    Args:
      path: of the file, made if it is missing.
      seconds: after which no further figure is begun.
    """

    def __init__(self, path: Path, seconds: float):
        self.path, self._end = path, time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.known: dict[str, Any] = {record["name"]: record for record in map(json.loads, lines)}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def write(self, name: str, **figures: Any) -> None:
        """Appends a figure."""
        record = {"name": name, **figures, "time": time.time()}
        self.known[name] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(record), flush=True)


def configured(model: Path, data: Path, *further: str) -> Config:
    """The configuration of the experiments with this model and these data."""
    weights = [] if any(model.glob("*.safetensors")) else ["model.initialize=random"]
    places = [f"data.{part}.path={data / part}.jsonl" for part in ("train", "validation", "test")]
    given = [f"model.path={model}", *weights, *places, f"search.trials={CONFIGURATIONS}", *further]
    return load_config("configs/studies/smollm2/slots_restaurant8k.yaml", given)


def times(journal: Journal, runner: TrainerRunner, configurations: Sequence[Mapping[str, Any]]) -> None:
    """Seconds to compile and of a step, by population."""
    opened = runner.opened
    trainer = runner.trainer(runner.configuration(configurations[0]))
    for size in POPULATIONS:
        if (name := f"population {size}") in journal.known or journal.left < 40:
            continue
        population, feed = Population(trainer, size, batched=True), opened.batches()
        for slot in range(size):
            values = hyperparameters(runner.configuration(configurations[slot]))
            population.put(slot, trainer.init(values), values)
        begin = time.perf_counter()
        _losses(population.step(dict.fromkeys(range(size), next(feed))))
        compiled = time.perf_counter() - begin
        taken = []
        for _ in range(TIMED):
            batches = {slot: next(feed) for slot in range(size)}
            begin = time.perf_counter()
            _losses(population.step(batches))
            taken.append(time.perf_counter() - begin)
        feed.close()
        tokens = size * opened.config.train.batch_size * opened.config.train.sequence_length
        seconds = statistics.median(taken)
        journal.write(name, compile_seconds=compiled, step_seconds=seconds, tokens_per_second=tokens / seconds)


def designed(journal: Journal, runner: TrainerRunner, configurations: Sequence[Mapping[str, Any]]) -> None:
    """A whole design, as many at a time as the largest population."""
    width = POPULATIONS[-1]
    trainer = runner.trainer(runner.configuration(configurations[0]))
    population = Population(trainer, width, batched=True)
    for start in range(0, CONFIGURATIONS, width):
        if (name := f"design {start}") in journal.known or journal.left < 30:
            continue
        begin = time.perf_counter()
        for slot in range(width):
            values = hyperparameters(runner.configuration(configurations[start + slot]))
            population.put(slot, trainer.init(values), values)
        feed = runner.opened.batches()
        losses: list[float] = []
        for _ in range(STEPS):
            losses = _losses(population.step(dict.fromkeys(range(width), next(feed))))
        feed.close()
        journal.write(name, seconds=time.perf_counter() - begin, losses=losses)


def sized(journal: Journal, opened: OpenedConfig, folder: Path) -> None:
    """Every size and seed as a slot of one population, each with examples and a length of its own."""
    if "sizes" in journal.known:
        return
    config, examples = opened.config, opened.examples["train"]
    units = read_documents(examples, config.data.explode, None, "examples")
    layout = {"sequence_length": config.train.sequence_length, "packing": config.data.packing}
    runs = [(min(size, len(examples)), seed) for size in SIZES for seed in SEEDS]
    orders = {seed: sampling_order(units, "stratified", seed) for seed in SEEDS}
    chosen = [[examples[place] for place in units.examples(orders[seed][:size])] for size, seed in runs]
    lengths = [
        steps_of_epochs(each, EPOCHS, batch_size=ROWS, seed=seed, **layout)
        for each, (_, seed) in zip(chosen, runs, strict=True)
    ]
    feeds = [
        train_batches(each, batch_size=ROWS, seed=seed, **layout) for each, (_, seed) in zip(chosen, runs, strict=True)
    ]
    trainer = opened.trainer()
    population = Population(trainer, len(runs), batched=True)
    saved, states = folder / "sizes.npz", []
    losses: dict[int, float] = {}
    first = 0
    like, tree = jax.tree.flatten(trainer.init(seed=0))
    if saved.exists():
        with np.load(saved) as held:
            first, known = int(held["step"]), held["losses"]
            losses = {slot: float(loss) for slot, loss in enumerate(known) if np.isfinite(loss)}
            states = [
                jax.tree.unflatten(tree, [held[f"{slot}-{place}"] for place in range(len(like))])
                for slot in range(len(runs))
            ]
    for slot, ((_, seed), length) in enumerate(zip(runs, lengths, strict=True)):
        population.put(slot, states[slot] if states else trainer.init(seed=seed), {"train.steps": length})
        for _ in range(min(first, length)):
            next(feeds[slot])
    begun = kept = time.perf_counter()
    for step in range(first, max(lengths)):
        active = [slot for slot, length in enumerate(lengths) if step < length]
        told = population.step({slot: next(feeds[slot]) for slot in active})
        if step % 50 == 0 or step + 1 == max(lengths):
            losses |= {slot: float(told[slot]["loss"]) for slot in active}
            if time.perf_counter() - kept > SAVE_SECONDS or journal.left < 20:
                kept = time.perf_counter()
                leaves = {
                    f"{slot}-{place}": np.asarray(leaf)
                    for slot in range(len(runs))
                    for place, leaf in enumerate(jax.tree.leaves(population.take(slot)))
                }
                known = np.array([losses.get(slot, np.nan) for slot in range(len(runs))])
                np.savez(folder / "partial.npz", step=step + 1, losses=known, **leaves)
                (folder / "partial.npz").replace(saved)
                journal.write(f"sizes at step {step + 1}", seconds=kept - begun, since=first)
                if journal.left < 20:
                    return
    runs_told = [
        {"examples": size, "seed": seed, "steps": length, "loss": losses.get(slot)}
        for slot, ((size, seed), length) in enumerate(zip(runs, lengths, strict=True))
    ]
    journal.write("sizes", seconds=time.perf_counter() - begun, since=first, runs=runs_told)


def _losses(metrics: Mapping[int, Mapping[str, float]]) -> list[float]:
    """The losses of all slots, which waits for the step."""
    return [float(metrics[slot]["loss"]) for slot in sorted(metrics)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory; without weights they are random")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, validation and test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="where journal and states lie")
    parser.add_argument("--call", type=int, choices=(1, 2), required=True, help="which of the two")
    parser.add_argument("--seconds", type=float, default=280, help="after which it ends")
    arguments = parser.parse_args()
    journal = Journal(arguments.out / "journal.jsonl", arguments.seconds)
    if "machine" not in journal.known:
        journal.write("machine", **machine(("jaxtune", "jax", "jaxlib")))
    further = [] if arguments.call == 1 else [f"train.batch_size={ROWS}", "train.steps=null", f"train.epochs={EPOCHS}"]
    begin = time.perf_counter()
    config = configured(arguments.model, arguments.data, *further)
    opened = OpenedConfig(config)
    journal.write(f"open {arguments.call} at {time.time():.0f}", seconds=time.perf_counter() - begin)
    if arguments.call == 1:
        configurations, runner = design(config), TrainerRunner(opened, population=POPULATIONS[-1])
        times(journal, runner, configurations)
        designed(journal, runner, configurations)
    else:
        sized(journal, opened, arguments.out)


if __name__ == "__main__":
    main()
