"""Records the learning curves of finished trials, which benchmarks/surrogates.py replays.

Trains scrambled Sobol points (Owen 1998) of a task's space to the end of their schedule and writes one line for each:
the configuration, the validation loss with its standard error at shares of the steps, the loss on the test split, and
the seconds of training. All trials share one compiled program, their data, its order and the validation examples. Any
first part of the sequence fills the space evenly, so a run that is stopped leaves a table that can be used; started
again it goes on behind the last line.

    python benchmarks/record_curves.py attr_oamine slots_restaurant8k --trials 64

Reads benchmarks/curves/TASK.yaml and writes benchmarks/curves/TASK.csv. From the repository's root.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

CURVES = Path(__file__).parent / "curves"
SHARES = (0.05, 0.10, 0.20, 0.40, 0.70, 1.0)
SEED = 0


def sobol_points(space: Any, count: int) -> list[list[float | int]]:
    """The first ``count`` points of a scrambled Sobol sequence, as points of the space."""
    from scipy.stats import qmc
    from skopt.space import Space as SkoptSpace
    from skopt.utils import normalize_dimensions

    unit = qmc.Sobol(len(space.dimensions), seed=SEED).random_base2(math.ceil(math.log2(count)))[:count]
    normalised = SkoptSpace(normalize_dimensions(space.to_skopt()))
    return [space.snap(point) for point in normalised.inverse_transform(unit)]


def train(runner: Any, configuration: dict[str, Any]) -> dict[str, float]:
    """Trains one trial to its end; its columns, empty from where it diverged."""
    from jaxtune.config import hyperparameters

    opened = runner.opened
    config = runner.configuration(configuration)
    trainer, values = runner.trainer(config), hyperparameters(config)
    state, batches = trainer.init(values), opened.batches(config)
    row: dict[str, float] = {}
    seconds = 0.0
    for share in SHARES:
        until = round(share * config.train.steps)
        result = trainer.fit(batches, state=state, hyperparameters=values, until=until, evaluate_at_end=False)
        state, seconds = result.state, seconds + result.seconds
        loss = None if result.stopped == "diverged" else trainer.evaluate(state, opened.validation_batches, values)
        if loss is None or not math.isfinite(loss.loss):
            break
        row[f"loss_{until}"], row[f"standard_error_{until}"] = loss.loss, loss.standard_error
    else:
        row["test_loss"] = trainer.evaluate(state, opened.loss_batches("test"), values).loss
    batches.close()
    return {**row, "seconds": seconds}


def columns(space: Any, steps: int) -> list[str]:
    """The table's columns in order."""
    reached = [round(share * steps) for share in SHARES]
    scores = [f"{name}_{step}" for step in reached for name in ("loss", "standard_error")]
    return [*space.keys, *scores, "test_loss", "seconds"]


def record(task: str, trials: int) -> None:
    """Adds the missing lines to a task's table."""
    from jaxtune.config import load_config
    from jaxtune.search.space import Space
    from jaxtune.search.trainer_runner import TrainerRunner
    from jaxtune.training.opened_config import OpenedConfig

    config = load_config(CURVES / f"{task}.yaml")
    opened = OpenedConfig(config)
    runner = TrainerRunner(opened)
    space = Space(config.search.space)
    names = columns(space, opened.config.train.steps)
    path = CURVES / f"{task}.csv"
    done = max(sum(1 for _ in path.open(encoding="utf-8")) - 1, 0) if path.exists() else 0
    print(f"{task}: {len(opened.examples['validation'])} validation examples, {done} of {trials} trials recorded")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        if not done:
            writer.writeheader()
        for number, point in enumerate(sobol_points(space, trials)):
            if number < done:
                continue
            begin = time.perf_counter()
            configuration = space.configuration(point)
            row = train(runner, configuration)
            rounded = {name: f"{value:.6g}" for name, value in row.items()}
            writer.writerow({**configuration, **rounded})
            file.flush()
            last = row.get(names[-4], math.nan)
            print(
                f"  {number}: rate {configuration['optimizer.learning_rate']:.2g}, final loss {last:.4f}, "
                f"{row['seconds']:.1f} s training, {time.perf_counter() - begin:.1f} s in all",
                flush=True,
            )
    compilations = sum(trainer.traces["step"] for trainer in runner.trainers)
    if compilations > 1:
        raise RuntimeError(f"{task}: the step was compiled {compilations} times; trials must share one program")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(path.stem for path in CURVES.glob("*.yaml")))
    parser.add_argument("--trials", type=int, default=64)
    arguments = parser.parse_args()
    for task in arguments.tasks:
        record(task, arguments.trials)


if __name__ == "__main__":
    main()
