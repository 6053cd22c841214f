"""Figures of the searched space: parallel coordinates, partial dependence and importance."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from jaxtune.reports import formatting, svg
from jaxtune.reports.figures import Figure, Table, draw, statuses
from jaxtune.reports.records import StudyRecord, TrialRecord

RAMP = 6


def short_key(key: str, keys: list[str]) -> str:
    """The shortest tail of a dotted key that no other key shares: ``rank``, or ``0.rank`` beside ``1.rank``."""
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        tail = ".".join(parts[-length:])
        if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1:
            return tail
    return key


def key_scale(dimension: Mapping[str, Any], values: list[Any]) -> svg.Scale:
    """The scale of a searched key: its bounds, widened to hold every value tried (the reference may lie outside)."""
    kind = next(iter(dimension), "choice")
    bounds = list(dimension.get(kind) or [])
    numbers = [value for value in [*bounds, *values] if formatting.finite(value) is not None]
    if kind == "choice" or not numbers or len(numbers) < len(bounds) + len(values) or min(numbers) == max(numbers):
        names = dict.fromkeys(formatting.setting(value) for value in [*bounds, *values])
        return svg.Scale(0.0, float(max(len(names) - 1, 1)), 0.0, 1.0, categories=tuple(names) or ("not set",))
    if kind in ("log_uniform", "power_of_two") and min(numbers) >= 0:
        return svg.logarithmic(numbers, base=2.0 if kind == "power_of_two" else 10.0, margin=0.0)
    return svg.linear(numbers, margin=0.0)


def ramp_classes(study: StudyRecord) -> dict[int, str]:
    """Trial → colour class from the rank of its early score: ``q0`` the best sixth … ``q5`` the worst.

    Ranks, since a few terrible scores would leave all others in one colour.
    """
    ranked = study.best_first(study.trials, "early_score")
    return {trial.id: f"q{min(RAMP - 1, index * RAMP // len(ranked))}" for index, trial in enumerate(ranked)}


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis of the parallel coordinates.

    Attributes:
      label: its name.
      key: dotted key; "" for the score.
      scale: in pixels along the axis.
      place: pixels across.
      title_at: where its title stands (titles of close axes alternate in height).
      room: characters that a tick's label may have.
    """

    label: str
    key: str
    scale: svg.Scale
    place: float
    title_at: float
    room: int

    def at(self, trial: TrialRecord) -> float | None:
        """Where a trial crosses the axis; None if it has no value there."""
        value = trial.configuration.get(self.key) if self.key else trial.early_score
        return None if value is None else self.scale(value)


def parallel_coordinates(study: StudyRecord, winner: int | None) -> Figure:
    """A line per trial through the searched keys and the early score. Upright on a phone, so that labels have room."""
    trials = [trial for trial in study.trials if trial.early_score is not None or trial.status == "failed"]
    scores = [trial.early_score for trial in trials if trial.early_score is not None]
    if not study.keys:
        return Figure(missing="The journal names no searched keys.")
    if len(scores) < 2:
        return Figure(missing="Fewer than two trials have been scored; there is nothing to compare yet.")
    tried = {key: [t.configuration[key] for t in trials if key in t.configuration] for key in study.keys}
    scales = [*(key_scale(study.space[key], values) for key, values in tried.items()), svg.for_scores(scores)]
    ramp, share = ramp_classes(study), formatting.is_share(study.objective)
    # The best are drawn last, on top.
    order = sorted(trials, key=lambda trial: (trial.id == winner, -int(ramp.get(trial.id, f"q{RAMP}")[1:])))

    def make(size: tuple[int, int]) -> ET.Element:
        upright = size[0] < 500
        root = svg.svg_root(
            size, "Parallel coordinates: a line per trial through the searched keys and its early score", role="group"
        )
        root.set("data-brush", "x" if upright else "y")
        axes = _axes(study, scales, size, upright=upright)
        lines = svg.element(root, "g")
        for trial in order:
            _parallel_line(lines, trial, axes, ramp.get(trial.id, "failed"), upright=upright, winner=trial.id == winner)
        for axis in axes:
            ticks = svg.percent_labels(axis.scale.ticks(5), share and not axis.key)
            group = svg.element(
                root, "g", class_="brush", tabindex=0, role="slider", aria_label=f"Filter {axis.key or axis.label}",
                aria_orientation="horizontal" if upright else "vertical", aria_valuemin=0, aria_valuemax=len(trials),
                aria_valuenow=len(trials), aria_valuetext="all trials", data_start=axis.scale.start,
                data_end=axis.scale.end,
            )  # fmt: skip
            (_lying_axis if upright else _standing_axis)(group, axis, ticks)
        return root

    drawings = draw(make, (1000, 410), (360, 74 + 78 * len(study.keys)))
    rows = []
    for trial in [*study.best_first(trials, "early_score"), *(trial for trial in trials if trial.early_score is None)]:
        values = [formatting.setting_of(trial.configuration, key) for key in study.keys]
        rows.append([str(trial.id), *values, formatting.score(trial.early_score, study.objective)])
    return Figure(**drawings, statuses=statuses(trials), table=Table(["Trial", *study.keys, "Early score"], rows))


def _axes(study: StudyRecord, scales: list[svg.Scale], size: tuple[int, int], *, upright: bool) -> list[_Axis]:
    """The axes in pixels: one per searched key, the score's last."""
    width, height = size
    names = [*((short_key(key, study.keys), key) for key in study.keys), ("early score", "")]
    start, end = (18.0, width - 18.0) if upright else (height - 34.0, 60.0)
    gap = (height - 74.0) / len(study.keys) if upright else (width - 152.0) / len(study.keys)
    crowded = any(len(one) + len(other) > 2 * gap / svg.CHARACTER - 2 for (one, _), (other, _) in pairwise(names))
    axes = []
    for index, ((label, key), scale) in enumerate(zip(names, scales, strict=True)):
        # Good scores end at the top (on a phone: on the right), whichever way they run.
        reverse = not key and study.goal.sign > 0
        place = (40.0 if upright else 74.0) + gap * index
        title_at = place - 9 if upright else (18.0 if crowded and index % 2 else 38.0)
        room = 12 if upright else int((gap - 16) / svg.CHARACTER)
        axes.append(
            _Axis(label, key, scale.over(end, start) if reverse else scale.over(start, end), place, title_at, room)
        )
    return axes


def _parallel_line(
    parent: ET.Element, trial: TrialRecord, axes: list[_Axis], colour: str, *, upright: bool, winner: bool
) -> None:
    """A trial's line; its places along the axes are kept as data for the filters."""
    along = [axis.at(trial) for axis in axes]
    points = [(axis.place, at) for axis, at in zip(axes, along, strict=True) if at is not None]
    data = svg.path([(at, place) for place, at in points] if upright else points)
    kind = f"parallel {colour}{' reference' if trial.reference else ''}{' winner' if winner else ''}"
    group = svg.line(parent, data, kind, trial.id)
    group.set("data-along", json.dumps([round(at, 1) if at is not None else None for at in along]))


def _lying_axis(group: ET.Element, axis: _Axis, ticks: list[tuple[Any, str]]) -> None:
    """An axis on a phone, with the strip that takes the pointer and the keyboard for filtering."""
    low, high, place = min(axis.scale.start, axis.scale.end), max(axis.scale.start, axis.scale.end), axis.place
    svg.element(group, "text", axis.label, class_="title", x=low, y=axis.title_at)
    svg.element(group, "rect", class_="strip", x=low - 8, y=place - 16, width=high - low + 16, height=36)
    svg.element(group, "line", class_="axis", x1=low, x2=high, y1=place, y2=place)
    svg.element(group, "rect", class_="range", x=low, y=place - 6, width=0, height=12)
    shown = ticks if len(ticks) <= 5 else ticks[::2]
    for value, text in shown:
        at = axis.scale(value)
        anchor = "start" if at < low + 12 else ("end" if at > high - 12 else "middle")
        svg.element(group, "text", svg.clip(text, axis.room), x=at, y=place + 15, text_anchor=anchor)


def _standing_axis(group: ET.Element, axis: _Axis, ticks: list[tuple[Any, str]]) -> None:
    """An axis on a wide page, with the strip that takes the pointer and the keyboard for filtering."""
    low, high, place = min(axis.scale.start, axis.scale.end), max(axis.scale.start, axis.scale.end), axis.place
    svg.element(group, "text", axis.label, class_="title", x=place, y=axis.title_at, text_anchor="middle")
    svg.element(group, "rect", class_="strip", x=place - 16, y=low - 8, width=32, height=high - low + 16)
    svg.element(group, "line", class_="axis", x1=place, x2=place, y1=low, y2=high)
    svg.element(group, "rect", class_="range", x=place - 6, y=low, width=12, height=0)
    # Labels of the last axis, the score's, stand outside, where no lines run.
    shift, anchor = (-9, "end") if axis.key else (9, "start")
    for value, text in ticks:
        shown = svg.clip(text, axis.room)
        svg.element(group, "text", shown, x=place + shift, y=axis.scale(value) + 4, text_anchor=anchor)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One key's partial dependence.

    Attributes:
      key: dotted key.
      importance: its share, None if not known.
      figure: the drawing (one size serves all pages).
    """

    key: str
    importance: float | None
    figure: Figure


def partial_dependence(study: StudyRecord) -> list[Panel]:
    """A panel per key, the most important first; [] if the summary has no partial dependence."""
    entries = [_finite_points(entry) for entry in study.summary.get("partial_dependence") or []]
    entries = [entry for entry in entries if entry["values"]]
    importance = importances(study)
    if not entries:
        return []
    ends = [end for entry in entries for end in _band(entry)]
    y = svg.linear([end for pair in ends for end in pair])
    panels = [Panel(entry["key"], importance.get(entry["key"]), _dependence(study, entry, y)) for entry in entries]
    return sorted(panels, key=lambda panel: -(panel.importance or 0.0))


def importances(study: StudyRecord) -> dict[str, float]:
    """Key → its share of the summed main effects, as the summary has it."""
    given = study.summary.get("importance") or {}
    return {key: value for key, item in given.items() if (value := formatting.finite(item)) is not None}


def _finite_points(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry without the values at which the mean or its deviation is not finite."""
    points = zip(entry["values"], entry["mean"], entry["standard_deviation"], strict=True)
    kept = [point for point in points if None not in (formatting.finite(point[1]), formatting.finite(point[2]))]
    columns = [list(column) for column in zip(*kept, strict=True)] or [[], [], []]
    return {**entry, **dict(zip(("values", "mean", "standard_deviation"), columns, strict=True))}


def _band(entry: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Mean less and plus one standard deviation at each value."""
    pairs = zip(entry["mean"], entry["standard_deviation"], strict=True)
    return [(mean - deviation, mean + deviation) for mean, deviation in pairs]


def _dependence(study: StudyRecord, entry: Mapping[str, Any], y: svg.Scale) -> Figure:
    key, values, mean = entry["key"], list(entry["values"]), list(entry["mean"])
    band = _band(entry)
    share = formatting.is_share(study.objective)
    tried = [trial for trial in study.trials if key in trial.configuration and trial.early_score is not None]
    x = key_scale(
        study.space.get(key) or {entry.get("kind", "uniform"): []}, [*values, *(t.configuration[key] for t in tried)]
    )
    plot = svg.Plot(
        (340, 200), x, y, label=f"Partial dependence of the early score on {key}",
        margins=(12, 18, 30, 48), ticks=(5, 4), percent_y=share, interactive=False,
    )  # fmt: skip
    if x.categories:
        for value, centre, (low, high) in zip(values, mean, band, strict=True):
            at = plot.x(value)
            svg.element(plot.root, "line", class_="whisker", x1=at, x2=at, y1=plot.y(low), y2=plot.y(high))
            svg.element(plot.root, "circle", class_="dot", cx=at, cy=plot.y(centre), r=4.0)
    else:
        upper = [(plot.x(value), plot.y(high)) for value, (_, high) in zip(values, band, strict=True)]
        lower = [(plot.x(value), plot.y(low)) for value, (low, _) in zip(values, band, strict=True)]
        svg.element(plot.root, "path", class_="band", d=svg.path([*upper, *reversed(lower)], close=True))
        plot.polyline(list(zip(values, mean, strict=True)), "mean")
    for trial in tried:
        at = plot.x(trial.configuration[key])
        group = svg.element(plot.root, "g", class_=f"rug {trial.status}", data_trial=trial.id)
        svg.element(group, "line", class_="stroke", x1=at, x2=at, y1=plot.bottom - 6, y2=plot.bottom)
    rows = [
        [formatting.setting(value), formatting.score(centre, study.objective), formatting.number((high - low) / 2, 2)]
        for value, centre, (low, high) in zip(values, mean, band, strict=True)
    ]  # fmt: skip
    return Figure(
        wide=svg.to_text(plot.root), table=Table([key, "Predicted early score", "± one standard deviation"], rows)
    )
