"""What a study came to, for programs, type checkers and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from jaxtune.telemetry.tables import html_table
from jaxtune.training.summary import AdapterFiles, Summary


class ScoredTrial(TypedDict):
    """One trial in the list of all; scores are None where there is none."""

    id: int
    configuration: dict[str, Any]
    values: NotRequired[dict[str, float | None]]
    early_score: float | None
    standard_error: float | None
    final_score: float | None
    status: str


class ComparedTrial(TypedDict):
    """The winner, or the reference (``in_space``: whether the surrogate learnt from it)."""

    trial: int
    configuration: dict[str, Any]
    early_score: float | None
    final_score: float | None
    final_metrics: dict[str, float] | None
    test_score: float | None
    test_metrics: dict[str, float] | None
    command: NotRequired[str]
    in_space: NotRequired[bool]


class UntunedScore(TypedDict):
    """What was measured on the test split before training; None without one."""

    test_score: float | None
    test_metrics: dict[str, float] | None


class Budget(TypedDict):
    """What a study took."""

    steps_run: int
    steps_if_all_finished: int
    compilations: int
    seconds: float


class SearchObjective(TypedDict):
    """The score's name, and whether ``min`` or ``max`` is better."""

    name: str
    direction: str


class RungScore(TypedDict):
    """What a trial came to at a rung."""

    trial: int
    score: float


class FinishRung(TypedDict):
    """A share of the steps after the fraction: how many were to go on to it beside the reference, and who did.

    ``step`` is None where trials differ in length; summaries of earlier versions have none.
    """

    share: float
    step: NotRequired[int | None]
    promoted: int
    trials: Sequence[RungScore]


class RepeatedTrial(TypedDict):
    """A finalist's scores with all seeds, its own first, and their mean with its interval.

    A score is None where that training diverged, and then so are mean and interval.
    """

    trial: int
    scores: Sequence[float | None]
    mean: float | None
    low: float | None
    high: float | None


class Repeats(TypedDict):
    """The finalists, the best mean first; how often each was trained, and the confidence of the intervals."""

    count: int
    confidence: float
    trials: Sequence[RepeatedTrial]


class FrontTrial(TypedDict):
    """A trial that no other one beats in all objectives: its values by name, at the fraction and at the end."""

    trial: int
    values: dict[str, float | None]
    final: dict[str, float | None] | None


class Bounds(TypedDict):
    """The bounds of ``search.where``, what the best trial has there, and whether it satisfies them."""

    bounds: dict[str, dict[str, float]]
    satisfied: bool
    best: dict[str, float | None]


class DroppedPrior(TypedDict):
    """The first trial that was proposed without the priors, and how many scores contradicted them."""

    trial: int
    scores: int


class StudySummary(Summary):
    """What ``jaxtune search`` came to, as in the study's ``summary.json``; each key is an attribute as well.

    Attributes:
      objective: name and direction of the score.
      fraction: share of its steps after which a trial was scored.
      trials: all of them, in the order of their numbers.
      best: the winner.
      baseline: the reference, trial 0.
      untuned: the model before training.
      test_difference: the winner's test score less the reference's, with its interval; None where there is none.
      rank_agreement: how well early scores foretold the final ones.
      budget: steps, compilations and seconds.
      ended: why no further trial was proposed: ``trials``, ``budget`` or ``terminator``.
      partial_dependence: curves of the score over each searched key.
      importance: share of each searched key in the score's variation.
      finish: the rungs after the fraction, the end among them; empty where that is the only one.
      seeds: what finalists came to with other seeds; None where none was repeated.
      objectives: all of several objectives, the first one first; empty where there is one.
      pareto: the trials on their front at the fraction.
      where: the bounds on them; None where there are none.
      prior_dropped: where scores contradicted the priors of the space; None where they did not, or there are none.
      adapter: the winner's PEFT adapter; None unless all that is trained are low-rank terms.
      model: the winner as a whole model, where no adapter holds all that is trained; else None.
    """

    __slots__ = ()

    objective: SearchObjective
    fraction: float
    trials: Sequence[ScoredTrial]
    best: ComparedTrial
    baseline: ComparedTrial
    untuned: UntunedScore
    test_difference: Mapping[str, Any] | None
    rank_agreement: Mapping[str, Any]
    budget: Budget
    ended: str
    partial_dependence: Sequence[Mapping[str, Any]]
    importance: Mapping[str, float]

    @property
    def finish(self) -> Sequence[FinishRung]:
        """The rungs after the fraction."""
        return self.get("finish") or []

    @property
    def seeds(self) -> Repeats | None:
        """The finalists with other seeds."""
        return self.get("seeds")

    @property
    def objectives(self) -> Sequence[SearchObjective]:
        """All of several objectives."""
        return self.get("objectives", [])

    @property
    def pareto(self) -> Sequence[FrontTrial]:
        """The trials on the front of several objectives."""
        return self.get("pareto", [])

    @property
    def where(self) -> Bounds | None:
        """The bounds, and whether the winner satisfies them."""
        return self.get("where")

    @property
    def prior_dropped(self) -> DroppedPrior | None:
        """Where the priors were dropped."""
        return self.get("prior_dropped")

    @property
    def adapter(self) -> AdapterFiles | None:
        """The winner's PEFT adapter."""
        return self.get("adapter")

    @property
    def model(self) -> AdapterFiles | None:
        """The winner as a whole model."""
        return self.get("model")

    def _repr_html_(self) -> str:
        best, direction = self.best, self.objective["direction"]
        title = f"{self.objective['name']} ({direction} is better): trial {best['trial']} won"
        tested = "" if best["test_score"] is None else f", {best['test_score']:.4g} on the test split"
        return trial_table(({"trial": trial["id"], **trial} for trial in self.trials), title + tested)


def trial_table(trials: Iterable[Mapping[str, Any]], title: str) -> str:
    """Trials as a table of HTML: number, status, scores and configuration.

    Args:
      trials: ``trial``, ``status``, ``early_score``, ``final_score`` and ``configuration`` of each.
      title: stands above the table.
    """
    return html_table(
        [
            {
                **{name: trial[name] for name in ("trial", "status", "early_score", "final_score")},
                **trial["configuration"],
            }
            for trial in trials
        ],
        title,
    )
