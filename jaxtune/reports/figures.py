"""Figures of scores: the search's convergence, early against final scores, learning curves.

Each is drawn twice, for a wide page and for a phone (text in a drawing scales with it, so one drawing cannot serve
both); the style sheet shows the one that fits.
"""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping

from jaxtune.reports import formatting, svg
from jaxtune.reports.records import StudyRecord, TrialRecord
from jaxtune.reports.trial_files import Curve

STATUS_WORDS = {
    "waiting": "waiting",
    "running": "under way",
    "scored": "scored early",
    "stopped": "stopped before",
    "promoted": "being finished",
    "finished": "finished",
    "failed": "failed",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """The data behind a figure.

    Attributes:
      header: column names.
      rows: cells as text.
    """

    header: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, or the words that stand in its place.

    Attributes:
      wide, narrow: SVG markup; empty if there is nothing to draw yet.
      missing: why there is nothing to draw.
      statuses: statuses that appear, for the legend.
      table: the data behind it.
    """

    wide: str = ""
    narrow: str = ""
    missing: str = ""
    statuses: tuple[str, ...] = ()
    table: Table | None = None


def draw(
    make: Callable[[tuple[int, int]], ET.Element], wide: tuple[int, int], narrow: tuple[int, int]
) -> dict[str, str]:
    """Both drawings of a figure, as arguments of :class:`Figure`."""
    return {"wide": svg.to_text(make(wide)), "narrow": svg.to_text(make(narrow))}


def score_label(study: StudyRecord, *, when: str = "") -> str:
    """An axis title such as ``validation loss at 20 %, lower is better``."""
    name = formatting.metric_name(study.objective)
    return f"{name}{when}, {study.goal.words}"


def at_fraction(study: StudyRecord) -> str:
    """``at 20 % of the steps``."""
    return f"at {formatting.percentage(study.fraction)} of the steps"


def statuses(trials: list[TrialRecord]) -> tuple[str, ...]:
    """The statuses that appear among trials, in the order of a trial's life."""
    present = {trial.status for trial in trials}
    return tuple(status for status in STATUS_WORDS if status in present)


def winner_name(study: StudyRecord, trial: int | None) -> str:
    """``winner`` once the study has ended; until then the best trial only leads."""
    return "winner" if study.summary.get("best") and any(done.id == trial for done in study.finished) else "leader"


def name_label(parent: ET.Element, text: str, x: float, y: float, plot: svg.Plot, *, above: bool) -> None:
    """A name beside a mark, on the side where there is room."""
    right = x < (plot.left + plot.right) / 2
    above = above or y > plot.bottom - 26
    svg.element(
        parent, "text", text, class_="name", x=x + (12 if right else -12), y=y + (-9 if above else 17),
        text_anchor="start" if right else "end",
    )  # fmt: skip


def convergence(study: StudyRecord, winner: int | None) -> Figure:
    """Each trial's early score in the order of the trials, and the best so far."""
    scored = [trial for trial in study.trials if trial.early_score is not None]
    shown = [trial for trial in study.trials if trial.early_score is not None or trial.status == "failed"]
    if not scored:
        return Figure(missing="No trial has been scored yet.")
    best: list[tuple[int, float]] = []
    for trial in scored:
        assert trial.early_score is not None
        best.append((trial.id, min([trial.early_score, *(score for _, score in best[-1:])], key=study.goal.signed)))
    scores = [trial.early_score for trial in scored if trial.early_score is not None]
    y = svg.for_scores(scores)
    if formatting.is_share(study.objective):
        y = svg.linear(scores, lowest=0.0)
    last = max(trial.id for trial in study.trials)

    def make(size: tuple[int, int]) -> ET.Element:
        plot = svg.Plot(
            size, svg.Scale(-0.6, max(last, 1) + 0.6, 0, 1), y,
            label="Convergence: each trial's early score and the best so far",
            x_label="trial, in order", y_label=score_label(study, when=f" {at_fraction(study)}") + log_note(y),
            integer_x=True, percent_y=formatting.is_share(study.objective), margins=(46, 16, 44, 58),
        )  # fmt: skip
        if study.trials[0].early_score is not None:
            at = plot.y(study.trials[0].early_score)
            svg.element(plot.root, "line", class_="guide", x1=plot.left, x2=plot.right, y1=at, y2=at)
        steps: list[tuple[float, float]] = []
        for index, (trial, value) in enumerate(best):
            if index:
                steps.append((trial, best[index - 1][1]))
            steps.append((trial, value))
        plot.polyline([*steps, (last, best[-1][1])], "best-so-far")
        for trial in shown:
            x = plot.x(trial.id)
            # A trial that diverged has no score: it stands in a strip of its own above the frame.
            at = plot.y(trial.early_score) if trial.early_score is not None else plot.top - 8
            if trial.early_score is not None and trial.early_error:
                spread = [max(plot.top, min(plot.bottom, plot.y(max(end, y.low)))) for end in around(trial)]
                svg.element(
                    plot.root, "line", class_="error", data_trial=trial.id, x1=x, x2=x, y1=spread[0], y2=spread[1]
                )
            svg.mark(
                plot.root, x, at, trial.status, trial=trial.id, reference=trial.reference, winner=trial.id == winner
            )
            if trial.id == winner and winner != 0:
                name_label(plot.root, winner_name(study, winner), x, at, plot, above=study.goal.sign < 0)
        return plot.root

    rows = [
        [str(trial.id), STATUS_WORDS[trial.status], formatting.score(trial.early_score, study.objective),
         formatting.score(dict(best).get(trial.id), study.objective)]
        for trial in study.trials
    ]  # fmt: skip
    table = Table(["Trial", "Status", "Early score", "Best so far"], rows)
    return Figure(**draw(make, (1000, 340), (360, 320)), statuses=statuses(shown), table=table)


def around(trial: TrialRecord) -> tuple[float, float]:
    """The early score one standard error down and up."""
    assert trial.early_score is not None
    return trial.early_score - (trial.early_error or 0.0), trial.early_score + (trial.early_error or 0.0)


def log_note(scale: svg.Scale) -> str:
    """What an axis title adds where the scale is logarithmic."""
    return " (log scale)" if scale.base else ""


def early_against_final(study: StudyRecord, winner: int | None) -> Figure:
    """Final against early score of the finished trials; the early scores of the others along the axis."""
    both = [trial for trial in study.finished if trial.early_score is not None]
    if len(both) < 2:
        done = "Only one trial" if study.finished else "No trial"
        return Figure(
            missing=f"{done} has been trained to the end; early and final scores can be compared from two on."
        )
    stopped = [trial for trial in study.trials if trial.early_score is not None and trial not in both]
    final = [trial.final_score for trial in both if trial.final_score is not None]
    every = [trial.early_score for trial in [*both, *stopped] if trial.early_score is not None]
    x, y = svg.for_scores(every), svg.linear(final, margin=0.12)
    share = formatting.is_share(study.objective)
    name = formatting.metric_name(study.objective)

    def make(size: tuple[int, int]) -> ET.Element:
        plot = svg.Plot(
            size, x, y, label="Early against final score of the finished trials",
            x_label=f"{name} {at_fraction(study)}{log_note(x)}", y_label=f"{name} at the end",
            percent_x=share, percent_y=share, ticks=(6, 5), margins=(34, 18, 44, 62),
        )  # fmt: skip
        for trial in stopped:
            at = plot.x(trial.early_score)
            group = svg.element(plot.root, "g", class_=f"rug {trial.status}", data_trial=trial.id)
            svg.element(group, "line", class_="hit", x1=at, x2=at, y1=plot.bottom - 14, y2=plot.bottom)
            svg.element(group, "line", class_="stroke", x1=at, x2=at, y1=plot.bottom - 10, y2=plot.bottom)
        for trial in sorted(both, key=lambda trial: trial.id == winner):  # the winner on top
            at = plot.x(trial.early_score), plot.y(trial.final_score)
            svg.mark(plot.root, *at, trial.status, trial=trial.id, reference=trial.reference, winner=trial.id == winner)
            if trial.id == winner or trial.reference:
                text = winner_name(study, winner) if trial.id == winner else "reference"
                name_label(plot.root, text, *at, plot, above=(trial.id == winner) == (study.goal.sign < 0))
        return plot.root

    ranked = {trial.id: rank for rank, trial in enumerate(study.best_first(both, "early_score"), 1)}
    rows = [
        [str(trial.id), formatting.score(trial.early_score, study.objective), str(ranked[trial.id]),
         formatting.score(trial.final_score, study.objective), str(rank)]
        for rank, trial in enumerate(study.best_first(both, "final_score"), 1)
    ]  # fmt: skip
    table = Table(["Trial", "Early score", "Early rank", "Final score", "Final rank"], rows)
    return Figure(**draw(make, (560, 380), (360, 320)), statuses=statuses(both), table=table)


def learning_curves(study: StudyRecord, winner: int | None) -> tuple[Figure, Figure]:
    """Training loss and validation loss by step, a line per trial."""
    training = {trial.id: trial.curve for trial in study.trials}
    validation = {trial.id: trial.validation for trial in study.trials}
    return (
        _curves(study, winner, training, "training loss"),
        # These are few, so each has a dot.
        _curves(study, winner, validation, "validation loss", dots=True),
    )


def _curves(
    study: StudyRecord, winner: int | None, curves: Mapping[int, Curve], loss_name: str, *, dots: bool = False
) -> Figure:
    finite = {id: [(step, loss) for step, loss in curve if loss is not None] for id, curve in curves.items()}
    shown = [trial for trial in study.trials if finite[trial.id]]
    if not shown:
        return Figure(missing=f"No trial has logged a {loss_name} yet.")
    y = svg.for_scores([loss for curve in finite.values() for _, loss in curve])
    lengths = {trial.total_steps for trial in study.trials if trial.total_steps}
    last = max(*(curves[trial.id][-1][0] for trial in shown), *lengths, 1)
    # Trials of different lengths are scored at different steps, so there is no one line to draw.
    scored_at = study.recorded.shares.steps(lengths.pop()).early if len(lengths) == 1 and study.fraction < 1 else None
    # The winner is drawn last, on top of the others.
    order = sorted(shown, key=lambda trial: (trial.id == winner, trial.reference, trial.status == "finished"))

    def make(size: tuple[int, int]) -> ET.Element:
        plot = svg.Plot(
            size, svg.Scale(0.0, float(last), 0, 1), y,
            label=f"Learning curves: {loss_name} by step, a line per trial",
            x_label="step", y_label=loss_name + log_note(y), integer_x=True, margins=(30, 20, 44, 58),
            ticks=(6 if size[0] > 500 else 4, 5),
        )  # fmt: skip
        if scored_at is not None:
            at = plot.x(scored_at)
            svg.element(plot.root, "line", class_="guide", x1=at, x2=at, y1=plot.top, y2=plot.bottom)
            svg.element(plot.root, "text", f"scored {at_fraction(study)}", class_="name", x=at + 6, y=plot.top + 10)
        for trial in order:
            kind = "winner" if trial.id == winner else ("reference" if trial.reference else "")
            line = plot.polyline(finite[trial.id], f"curve {trial.status} {kind}".strip(), trial.id)
            for step, loss in finite[trial.id] if dots else []:
                svg.element(line, "circle", class_="evaluation", cx=plot.x(step), cy=plot.y(loss), r=3.0)
            if trial.status == "failed":
                step, loss = finite[trial.id][-1]
                svg.mark(plot.root, plot.x(step), plot.y(loss), "failed", trial=trial.id)
        return plot.root

    rows = []
    for trial in shown:
        curve = finite[trial.id]
        diverged = curves[trial.id][-1][1] is None
        rows.append(
            [str(trial.id), STATUS_WORDS[trial.status], str(curves[trial.id][-1][0]), formatting.number(curve[0][1]),
             formatting.number(min(loss for _, loss in curve)),
             "no longer finite" if diverged else formatting.number(curve[-1][1])]
        )  # fmt: skip
    table = Table(["Trial", "Status", "Last step", "First loss", "Lowest loss", "Last loss"], rows)
    return Figure(**draw(make, (540, 360), (360, 320)), statuses=statuses(shown), table=table)
