"""A trained state on the test split: its loss, and its task metrics where answers are scored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.config.metrics import is_generated
from jaxtune.evaluation.evaluator import Evaluator
from jaxtune.search.outcome import TestOutcome
from jaxtune.training.state import TrainState
from jaxtune.training.trainer import Trainer


def measure(
    trainer: Trainer,
    state: TrainState,
    batches: Sequence[Mapping[str, np.ndarray]],
    evaluator: Evaluator | None,
    objective: str,
    *,
    begin: float,
    values: Mapping[str, float] | None = None,
    clusters: list[str] | list[int] | None = None,
) -> TestOutcome:
    """Measures a state.

    Args:
      trainer: whose state it is.
      state: the trained state, or a fresh one for the untuned model.
      batches: every example of the split once.
      evaluator: generates and scores the answers of the split; None without a task.
      objective: the name of a metric.
      begin: when the work on it began, by ``time.perf_counter``.
      values: overrides of single hyperparameters by dotted key.
      clusters: the document of each example, for a loss; None where all are independent.
    """
    loss = trainer.evaluate(state, batches, values)
    metrics, score = {"loss": loss.loss}, loss.loss
    examples: dict[str, Any] = {
        "per_example": (loss.example_sums / loss.example_weights).tolist(),
        "weights": loss.example_weights.tolist(),
        "clusters": clusters,
    }
    if evaluator is not None:
        task = evaluator.evaluate(*trainer.apply(state, values))
        metrics |= task.metrics
        if is_generated(objective):
            score, examples = task.metrics[objective], task.per_example(objective)
    return TestOutcome(score=score, metrics=metrics, seconds=time.perf_counter() - begin, **examples)
