"""What is measured of a model, and which way is better: one table for all who name, compare or show a score.

A task's metrics are one entry of :data:`TASKS`; the configuration takes their names from there, so that a search, an
experiment and a report know a new metric without being told of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtune.errors import UserError, nearest

Direction = Literal["min", "max"]


@dataclass(frozen=True)
class Goal:
    """Which way a score is better.

    Attributes:
      direction: whether it is minimised or maximised.
    """

    direction: Direction

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Goal:
        """Of an ``objective`` as journals and summaries have it; they may tell of metrics that are no longer there."""
        return cls(recorded["direction"])

    @property
    def sign(self) -> float:
        """What makes lower better: 1 or -1, to multiply scores with."""
        return 1.0 if self.direction == "min" else -1.0

    def signed(self, score: float) -> float:
        """A score of which lower is better; of a signed one, the score."""
        return self.sign * score

    def better(self, score: float, other: float) -> bool:
        """Whether ``score`` is better than ``other``."""
        return self.signed(score) < self.signed(other)

    def gain(self, before: float, after: float) -> float:
        """By how much ``after`` is better than ``before``; negative where it is worse."""
        return self.signed(before) - self.signed(after)

    @property
    def word(self) -> str:
        """``lower`` or ``higher``."""
        return "lower" if self.direction == "min" else "higher"

    @property
    def words(self) -> str:
        """``lower is better``, for people."""
        return f"{self.word} is better"


@dataclass(frozen=True)
class Metric:
    """A number that is measured of a model.

    Attributes:
      direction: whether lower or higher is better.
      label: its name for people.
      low: the least it can be; None where it has no bound.
      high: the most it can be.
      format: how a progress line writes it.
      logged: its name among what an evaluation during training logs; empty where that is its own.
      by_example: whether it is a weighted mean over examples whose weights do not depend on the model, so that two
        models can be compared example by example.
    """

    direction: Direction
    label: str
    low: float | None = None
    high: float | None = None
    format: str = "{:.4f}"
    logged: str = ""
    by_example: bool = False

    @property
    def goal(self) -> Goal:
        """Which way is better."""
        return Goal(self.direction)

    @property
    def is_share(self) -> bool:
        """Whether it lies in [0, 1], and is read as a percentage."""
        return (self.low, self.high) == (0.0, 1.0)

    @property
    def best(self) -> float | None:
        """The best that it can be."""
        return self.low if self.direction == "min" else self.high


def _share(label: str, *, by_example: bool = False) -> Metric:
    return Metric("max", label, 0.0, 1.0, "{:.3f}", by_example=by_example)


VALIDATION_LOSS = "validation_loss"
"""The loss on the validation split, as a run logs it beside the training loss."""

TASKS: dict[str, dict[str, Metric]] = {
    "extraction": {
        "exact_match": _share("exact match", by_example=True),
        "f1": _share("F1"),
        "precision": _share("precision"),
        "recall": _share("recall"),
        "f1_macro": _share("F1 macro"),
        "precision_macro": _share("precision macro"),
        "recall_macro": _share("recall macro"),
        "accuracy": _share("accuracy"),
    }
}
"""What each task of ``evaluation.task`` measures of generated answers, by name."""

METRICS: dict[str, Metric] = {
    "loss": Metric("min", "validation loss", low=0.0, logged=VALIDATION_LOSS, by_example=True),
    **{name: metric for metrics in TASKS.values() for name, metric in metrics.items()},
}
"""All that a score can be, by its name in the configuration, in journals and in summaries."""

COSTS: dict[str, Metric] = {
    "adapter_bytes": Metric("min", "adapter bytes", low=0.0, format="{:,.0f}"),
    "flops": Metric("min", "training FLOPs", low=0.0, format="{:.3g}"),
}
"""What is counted of a configuration before it is trained: no clock has a part in it, so that a replay repeats it."""


def task_metrics(task: str) -> dict[str, Metric]:
    """What can be measured with ``evaluation.task``: the loss always, and what the task adds."""
    return {"loss": METRICS["loss"], **TASKS.get(task, {})}


def described(name: str) -> Metric:
    """A metric or a cost by its name."""
    return COSTS[name] if name in COSTS else METRICS[name]


def is_generated(name: str) -> bool:
    """Whether a metric is measured of generated answers, which takes a task."""
    return any(name in metrics for metrics in TASKS.values())


def main_metrics() -> tuple[str, ...]:
    """The metrics that a short line has room for: the loss, and the first of each task."""
    return ("loss", *(next(iter(metrics)) for metrics in TASKS.values()))


def check_measured(name: str, task: str, key: str) -> None:
    """Refuses a metric that is not measured.

    Args:
      name: of the metric.
      task: ``evaluation.task``.
      key: that names the metric, for the message.

    Raises:
      UserError: it takes a task where there is none, or another one.
    """
    measured = task_metrics(task)
    if name in measured:
        return
    if task == "none":
        raise UserError(f"{key}: {name!r} needs evaluation.task, which is 'none'")
    raise UserError(f"{key}: evaluation.task {task} does not measure {name!r}{nearest(name, measured)}")


if TYPE_CHECKING:
    TaskName = str
    MetricName = str
    ExampleMetricName = str
    ObjectiveName = str
else:
    TaskName = Literal[("none", *TASKS)]
    MetricName = Literal[tuple(METRICS)]
    ObjectiveName = Literal[(*METRICS, *COSTS)]
    ExampleMetricName = Literal[tuple(name for name, metric in METRICS.items() if metric.by_example)]
