"""Several objectives on the page: their trade-offs as a figure, and what became of the bounds on them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

from jaxtune.reports import formatting, svg
from jaxtune.reports.figures import STATUS_WORDS, Figure, Table, at_fraction, draw, log_note, name_label, winner_name
from jaxtune.reports.records import StudyRecord
from jaxtune.search.objectives import SATISFIED, bounds_in_words, pareto


def front(study: StudyRecord, winner: int | None) -> Figure | None:
    """The first two objectives of each trial at the fraction, and the front; None where there is one objective.

    The table has all objectives, of the trials on the front also at the end.
    """
    objectives, states = study.recorded.objectives, study.recorded.history.trials
    if not objectives.several:
        return None
    first, second = objectives.names[:2]
    values = {number: objectives.values(state, state.early) for number, state in states.items() if state.ranked}
    places = {
        number: (across, up)
        for number, of in values.items()
        if (across := of[second]) is not None and (up := of[first]) is not None
    }
    if not places:
        return Figure(missing="No trial has been scored yet.")
    entries = {entry["trial"]: entry for entry in pareto(objectives, states)}
    goal = objectives.goals()[1]
    beyond = sorted((places[number] for number in entries if number in places), key=lambda at: goal.signed(at[0]))
    x, y = svg.for_scores(at[0] for at in places.values()), svg.for_scores(at[1] for at in places.values())
    shown = [trial for trial in study.trials if trial.id in places]

    def make(size: tuple[int, int]) -> ET.Element:
        plot = svg.Plot(
            size, x, y, label=f"Trade-offs: {formatting.metric_name(first)} against {formatting.metric_name(second)}",
            x_label=f"{formatting.metric_name(second)}, {goal.words}{log_note(x)}",
            y_label=f"{formatting.metric_name(first)} {at_fraction(study)}, {objectives.goal.words}{log_note(y)}",
            percent_x=formatting.is_share(second), percent_y=formatting.is_share(first), ticks=(6, 5),
            margins=(46, 18, 44, 62),
        )  # fmt: skip
        if len(objectives.names) == 2:
            steps = list(beyond[:1])
            for before, after in pairwise(beyond):
                steps += [(after[0], before[1]), after]
            plot.polyline(steps, "best-so-far")
        for trial in sorted(shown, key=lambda trial: trial.id in entries):
            at = plot.x(places[trial.id][0]), plot.y(places[trial.id][1])
            svg.mark(plot.root, *at, trial.status, trial=trial.id, reference=trial.reference, winner=trial.id == winner)
            if trial.id == winner:
                name_label(plot.root, winner_name(study, winner), *at, plot, above=objectives.goal.sign < 0)
        return plot.root

    names = [*values[next(iter(values))]]
    rows = []
    for trial in sorted(shown, key=lambda trial: trial.id not in entries):
        entry = entries.get(trial.id)
        final = (entry or {}).get("final") or {}
        rows.append(
            [
                str(trial.id),
                STATUS_WORDS[trial.status],
                "yes" if entry else "",
                *(formatting.score(values[trial.id][name], name) for name in names),
                formatting.score(final.get(first), first) if entry else "",
            ]
        )
    labels = [formatting.metric_name(name) for name in names]
    table = Table(["Trial", "Status", "On the front", *labels, f"{labels[0]} at the end"], rows)
    statuses = tuple(status for status in STATUS_WORDS if status in {trial.status for trial in shown})
    return Figure(**draw(make, (1000, 360), (360, 320)), statuses=statuses, table=table)


def bounds(study: StudyRecord) -> str:
    """What became of the bounds on the objectives; empty where there are none."""
    objectives, ahead = study.recorded.objectives, study.recorded.leader
    if not objectives.where or ahead is None:
        return ""
    words = bounds_in_words(objectives.where)
    outcome = ahead.final or ahead.early
    if objectives.violation(ahead, outcome) == SATISFIED:
        return f"Of the trials with {words} it is the best."
    has = ", ".join(
        f"{formatting.metric_name(name)} {formatting.score(objectives.value(name, ahead, outcome), name)}"
        for name in objectives.where
    )
    told = "No finished trial" if ahead.final else "No trial so far"
    return f"{told} has {words}; this one violates it least ({has})."
