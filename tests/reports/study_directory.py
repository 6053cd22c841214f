"""Writes a study's directory as a search leaves it: the real study over a runner that makes its scores up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxtune.config.search_section import SearchConfig
from jaxtune.search import Interrupted, Outcome, Study, TestOutcome, Trial

STEPS = 400
SPACE: dict[str, dict[str, Any]] = {
    "optimizer.learning_rate": {"log_uniform": [1e-5, 3e-2]},
    "optimizer.warmup": {"uniform": [0.0, 0.3]},
    "update.0.rank": {"power_of_two": [4, 64]},
    "update.0.alpha": {"log_uniform": [4.0, 128.0]},
    "train.batch_size": {"choice": [8, 16, 32]},
}
BASE: dict[str, Any] = {
    "model": {"path": "jaxtune:nano"},
    "data": {"train": {"path": "tfds:product_listings", "split": "train"}},
    "train": {"steps": STEPS, "batch_size": 16},
    "optimizer": {"learning_rate": 1e-4, "warmup": 0.1},
    "update": [{"rank": 16, "alpha": 32.0}],
}


class MadeUpRunner:
    """Scores from a bowl around a good learning rate, with noise; lower is better unless ``share``.

    Args:
      directory: the study's, for the trials' metrics.
      share: the score is a share of exact matches, higher is better.
      diverged: trials that diverge before they are scored.
      late: trials that diverge after it.
      stop_at: the trial that is under way when the study is interrupted.
      has_test: whether there is a test split.
      reference_gain: how much better the reference is than its hyperparameters deserve.
    """

    capacity = 1

    def __init__(
        self,
        *,
        share: bool = False,
        diverged: tuple[int, ...] = (),
        late: tuple[int, ...] = (),
        stop_at: int | None = None,
        has_test: bool = True,
        reference_gain: float = 0.0,
    ):
        self._started: list[tuple[Trial, int]] = []
        self.share, self.diverged, self.late = share, diverged, late
        self.stop_at, self.has_test, self.reference_gain = stop_at, has_test, reference_gain

    def total_steps(self, trial: Trial) -> int:
        return STEPS

    def program(self, trial: Trial) -> str:
        return "one" if trial.id else "the reference's"

    def start(self, trial: Trial, until: int) -> None:
        self._started.append((trial, until))

    def wait(self) -> list[tuple[Trial, Outcome]]:
        trial, until = self._started[0]
        outcome = self._run(trial, until)
        del self._started[0]
        return [(trial, outcome)]

    def close(self) -> None:
        self._started = []

    def _run(self, trial: Trial, until: int) -> Outcome:
        generator = np.random.default_rng([trial.id, until])
        if trial.id == self.stop_at:
            self._write_metrics(trial, until // 2, generator)
            raise Interrupted
        if trial.id in (self.late if until == STEPS else self.diverged):
            reached = max(until * 3 // 5, 30)
            self._write_metrics(trial, reached, generator, diverged=True)
            return Outcome(math.nan, None, reached, reached * 0.05, {"loss": math.nan}, diverged=True)
        self._write_metrics(trial, until, generator)
        score = self._score(trial, until) + float(generator.normal(0, 0.004))
        return Outcome(score, 0.009 if until < STEPS else 0.006, until, until * 0.05, {"loss": score})

    def test(self, trial: Trial | None) -> TestOutcome | None:
        if not self.has_test:
            return None
        generator = np.random.default_rng(7 if trial is None else [7, trial.id])
        score = (0.04 if self.share else 1.94) if trial is None else self._score(trial, STEPS)
        examples = (score + 0.1 * generator.standard_normal(300)).tolist()
        measures = {"loss": 0.4, "exact_match": 0.81, "exact_match/brand": 0.9, "f1": 0.84}
        return TestOutcome(float(np.mean(examples)), measures, examples, seconds=3.0)

    def _quality(self, trial: Trial) -> float:
        rate = math.log10(trial.configuration.get("optimizer.learning_rate", 1e-4)) + 2.8
        rank = math.log2(trial.configuration.get("update.0.rank", 16))
        return 0.35 * rate**2 + 0.02 * (6 - rank) - (self.reference_gain if trial.id == 0 else 0.0)

    def _score(self, trial: Trial, until: int) -> float:
        loss = (0.31 if until == STEPS else 0.62) + 0.3 * self._quality(trial)
        return 1 / (1 + loss) if self.share else loss

    def _write_metrics(self, trial: Trial, until: int, generator: Any, *, diverged: bool = False) -> None:
        quality = max(self._quality(trial), 0.0)
        lines: list[Mapping[str, Any]] = []
        for step in range(2, until + 1, 2):
            noise = 0.02 * float(generator.normal())
            loss: float | None = 0.3 + 0.3 * quality + 2.2 * math.exp(-step / (30 + 30 * quality)) + noise
            if diverged:
                loss = None if step > until * 0.8 else loss * (1 + 3 * (step / until) ** 4)
            lines.append({"step": step, "loss": loss, "learning_rate": 1e-4, "tokens_per_second": 9000.0})
        evaluated = [] if diverged else [*range(80, until, 80), until]
        lines += [{"step": step, "validation_loss": self._score(trial, until) + 20 / step} for step in evaluated]
        lines.sort(key=lambda line: line["step"])
        (trial.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_study(
    directory: Path,
    *,
    trials: int = 12,
    promote: int = 4,
    objective: str = "loss",
    space: Mapping[str, Any] | None = None,
    name: str = "quickstart",
    base: Mapping[str, Any] = BASE,
    ladder: tuple[float, ...] = (),
    **runner: Any,
) -> Path:
    """Runs a study (all proposals from the initial design, which needs no surrogate) and returns its directory."""
    search = SearchConfig.model_validate(
        {
            "space": dict(SPACE if space is None else space), "trials": trials, "promote": promote, "initial": trials,
            "objective": objective, "ladder": list(ladder), "finish": [1.0], "promote_by": "mean",
        }
    )  # fmt: skip
    share = objective != "loss"
    made_up = MadeUpRunner(share=share, **runner)
    study = Study(directory, search, made_up, direction="max" if share else "min", reference={}, base=base)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"name": name, **base}))
    study.run()
    return directory
