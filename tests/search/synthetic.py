"""A runner that trains nothing: analytic learning curves with a known best configuration.

Run as a script (``python synthetic.py RUN_DIR SEED DELAY``) it runs one small study, for tests that kill it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxtune.config.search_section import DimensionConfig, SearchConfig
from jaxtune.search import Interrupted, Outcome, Study, TestOutcome, Trial

SPACE = {
    "optimizer.learning_rate": {"log_uniform": (1e-5, 1e-2)},
    "update.0.rank": {"power_of_two": (2, 64)},
    "update.0.dropout": {"uniform": (0.0, 0.3)},
    "optimizer.schedule": {"choice": ["cosine", "linear"]},
}
REFERENCE = {
    "optimizer.learning_rate": 1e-4,
    "update.0.rank": 16,
    "update.0.dropout": 0.1,
    "optimizer.schedule": "cosine",
}


def search_config(**changes) -> SearchConfig:
    """A small study."""
    space = changes.pop("space", SPACE)
    settings = {"trials": 8, "promote": 3, "initial": 4, "seed": 0, "fraction": 0.2}
    # What is recorded of these studies was proposed, promoted and finished so.
    settings |= {"acquisition": "ei", "finish": [1.0], "promote_by": "mean", **changes}
    return SearchConfig(space={key: DimensionConfig(**value) for key, value in space.items()}, **settings)


class SyntheticRunner:
    """Learning curves ``floor + (1 - floor) exp(-speed t)`` whose floor is quadratic in the configuration.

    Rates above ``divergence`` diverge. The score has a little noise that depends on trial and step alone.
    """

    steps = 50

    def __init__(
        self,
        *,
        optimum: float = 1e-3,
        divergence: float = 5e-3,
        noise: float = 0.002,
        sign: float = 1.0,
        capacity: int = 1,
    ):
        self.capacity = capacity
        self.started: list[tuple[Trial, int]] = []
        self.optimum, self.divergence, self.noise, self.sign = optimum, divergence, noise, sign
        self.calls: list[tuple[int, int]] = []
        self.tests: list[int | None] = []
        self.before: Callable[[Trial, int], None] = lambda trial, until: None
        self.delay = 0.0

    def floor(self, configuration) -> float:
        rate = math.log10(configuration["optimizer.learning_rate"] / self.optimum)
        rank = math.log2(configuration.get("update.0.rank", 16)) - 5
        dropout = configuration.get("update.0.dropout", 0.1)
        linear = configuration.get("optimizer.schedule") == "linear"
        return 0.3 + 0.15 * rate**2 + 0.005 * rank**2 + 0.5 * dropout**2 + 0.02 * linear

    def value(self, configuration, step: int) -> float:
        if configuration["optimizer.learning_rate"] > self.divergence:
            return math.nan
        digest = hashlib.sha256(json.dumps([configuration, step], sort_keys=True).encode()).digest()
        noise = np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(0, self.noise)
        floor = self.floor(configuration)
        return floor + 0.3 * math.exp(-4 * step / self.steps) + noise

    def total_steps(self, trial: Trial) -> int:
        return self.steps

    def program(self, trial: Trial) -> str:
        return trial.configuration.get("optimizer.schedule", "cosine")

    def start(self, trial: Trial, until: int) -> None:
        assert len(self.started) < self.capacity
        self.started.append((trial, until))

    def wait(self) -> list[tuple[Trial, Outcome]]:
        """The first one started ends first."""
        trial, until = self.started[0]
        outcome = self.run(trial, until)
        del self.started[0]
        return [(trial, outcome)]

    def close(self) -> None:
        self.started = []

    def run(self, trial: Trial, until: int) -> Outcome:
        self.calls.append((trial.id, until))
        with (trial.directory / "calls.txt").open("a") as file:
            file.write(f"{until}\n")
        self.before(trial, until)
        time.sleep(self.delay)
        score = self.sign * self.value(trial.configuration, until)
        return Outcome(score, self.noise, until, 0.5, {"validation_loss": score}, diverged=math.isnan(score))

    def test(self, trial: Trial | None) -> TestOutcome | None:
        self.tests.append(None if trial is None else trial.id)
        time.sleep(self.delay)
        mean = 1.0 if trial is None else self.floor(trial.configuration)
        hard = np.random.default_rng(0).normal(0, 0.2, 60)
        scores = (self.sign * (mean + hard)).tolist()
        return TestOutcome(float(np.mean(scores)), {"loss": float(np.mean(scores))}, scores)


def records(run_dir: Path) -> list[dict]:
    """The journal without what may differ between two runs of one study."""
    lines = (run_dir / "trials.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def interrupt_at(trial_id: int, until: int) -> Callable[[Trial, int], None]:
    """A ``before`` hook that stops in the middle of one trial."""

    def before(trial: Trial, step: int) -> None:
        if (trial.id, step) == (trial_id, until):
            raise Interrupted

    return before


if __name__ == "__main__":
    runner = SyntheticRunner()
    runner.delay = float(sys.argv[3])
    search = search_config(seed=int(sys.argv[2]))
    Study(sys.argv[1], search, runner, reference=REFERENCE, base={"name": "killed"}).run()
    os._exit(0)
