"""The page of the experiment on update methods: its table, its findings, its figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.config.metrics import METRICS, Goal
from jaxtune.experiments.drawing import whisker
from jaxtune.experiments.output import markdown_table
from jaxtune.reports import formatting, svg
from jaxtune.reports.formatting import ABSENT

Summary = Mapping[str, Any]

_PANEL = (230, 170)
_COLUMNS = 4


def title(summary: Summary) -> str:
    """The page's title."""
    return f"Update methods, each at its own rate: {summary['task']}"


def _metric(summary: Summary) -> str:
    return summary["score"]["name"]


def _shown(score: Mapping[str, float] | None, metric: str) -> str:
    """A score with its interval."""
    if score is None:
        return ABSENT
    value, low, high = (formatting.score(score[end], metric) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _against(against: Mapping[str, Any] | None, metric: str) -> str:
    """A difference with its interval; a star where it is told from none."""
    if against is None:
        return ABSENT
    value, low, high = (formatting.difference(against[end], metric) for end in ("difference", "low", "high"))
    return f"{value} [{low}, {high}]{' *' if against['told_apart'] else ''}"


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def _ordered(summary: Summary) -> list[Mapping[str, Any]]:
    """The methods, best first; those without a score last."""
    goal = Goal.of(summary["score"])
    return sorted(
        summary["methods"],
        key=lambda entry: float("inf") if entry["score"] is None else goal.signed(entry["score"]["value"]),
    )


def rows(summary: Summary) -> list[dict[str, str]]:
    """A row for each method, the best first."""
    metric = _metric(summary)
    return [
        {
            "method": entry["name"],
            "rate": (ABSENT if entry["rate"] is None else f"{entry['rate']:g}") + (" (end)" if entry["on_end"] else ""),
            formatting.metric_name(metric).removeprefix("validation "): _shown(entry["score"], metric),
            f"against {summary['reference']}": _against(entry["against"], metric),
            "trained": f"{entry['share']:.3%}",
            "optimizer": _size(entry["optimizer_bytes"]),
            "file": _size(entry["file_bytes"]) + (" (model)" if entry["file"] == "model" else ""),
        }
        for entry in _ordered(summary)
    ]


def findings(summary: Summary) -> list[str]:
    """What the numbers say, in sentences, and what comes next."""
    metric, scored = _metric(summary), [entry for entry in summary["methods"] if entry["score"] is not None]
    best = next(entry for entry in scored if entry["name"] == summary["best"])
    said = [f"Best is {best['name']}, at the rate {best['rate']:g}: {_shown(best['score'], metric)}."]
    told = [entry["name"] for entry in scored if entry["against"] is not None and entry["against"]["told_apart"]]
    if told:
        said.append(f"Told apart from {summary['reference']}: {_listed(told)}.")
    else:
        said.append(f"None is told apart from {summary['reference']}.")
    if summary["untuned"] is not None:
        said.append(f"The untuned model has {formatting.score(summary['untuned'], metric)}.")
    rates = [entry["rate"] for entry in scored]
    if min(rates) < max(rates):
        said.append(f"The best rates lie between {min(rates):g} and {max(rates):g}.")
    if ends := [entry["name"] for entry in scored if entry["on_end"]]:
        said.append(f"The best rate is an end of those tried, and a better one may lie beyond it, of {_listed(ends)}.")
    if lost := [entry["name"] for entry in summary["methods"] if entry["rate"] is None]:
        said.append(f"With every rate {_listed(lost)} diverged.")
    if lost := [entry["name"] for entry in summary["methods"] if entry["rate"] is not None and entry["score"] is None]:
        said.append(f"Without a score, as a seed diverged: {_listed(lost)}.")
    said.append(f"Next, the best one by itself: {summary['next']}")
    return said


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def text(summary: Summary) -> list[str]:
    """The page, as Markdown paragraphs."""
    objective, score, interval = summary["objective"], summary["score"], summary["interval"]
    confidence = formatting.percentage(interval["confidence"])
    *said, following = findings(summary)
    return [
        f"For each of {len(summary['methods'])} update methods a learning rate was searched, half a decade apart, on "
        f"runs of {summary['rate_steps']:,} steps that were compared by {formatting.metric_name(objective['name'])} on "
        f"the validation split. With its best rate each then trained for {summary['steps']:,} steps with the seeds "
        f"{_listed([str(seed) for seed in summary['seeds']])}; the score is the mean over these of "
        f"{METRICS[score['name']].label.removeprefix('validation ')} on the test split, {Goal.of(score).words}.",
        " ".join(said),
        markdown_table(rows(summary)),
        f"In brackets: {confidence} percentile intervals of {interval['bootstrap']:,} bootstrap draws of "
        f"{interval['over']}, the same ones for all methods. A star: told from none by Holm's method over all "
        "differences. *Trained*: share of all parameters, those of adapters among them. *Optimizer*: what it keeps of "
        "them. *File*: the adapter that a run ends with, or the model, where no adapter holds what it trained. "
        "*(end)*: the lowest or highest rate that was tried.",
        "![Scores of all methods](scores.svg)",
        "## Rates",
        markdown_table(_rate_rows(summary)),
        "![Scores by rate](rates.svg)",
        f"{following.partition(': ')[0]}:",
        f"```\n{summary['next']}\n```",
    ]


def _rate_rows(summary: Summary) -> list[dict[str, str]]:
    metric = summary["objective"]["name"]
    return [
        {
            "method": entry["name"],
            f"rate: {formatting.metric_name(metric)}": "; ".join(
                f"{one['rate']:g}: {'diverged' if one['score'] is None else formatting.score(one['score'], metric)}"
                for one in entry["rates"]
            ),
        }
        for entry in summary["methods"]
    ]


def figures(summary: Summary) -> dict[str, ET.Element]:
    """The drawings: file name -> SVG."""
    return {"scores": _scores(summary), "rates": _rates(summary)}


def _scores(summary: Summary) -> ET.Element:
    """Scores with their intervals, a line for each method, the best at the top."""
    entries = [entry for entry in reversed(_ordered(summary)) if entry["score"] is not None]
    names, metric = tuple(entry["name"] for entry in entries), _metric(summary)
    label = METRICS[metric].label.removeprefix("validation ")
    plot = svg.Plot(
        (920, 90 + 30 * len(names)),
        svg.linear([entry["score"][end] for entry in entries for end in ("value", "low", "high")]),
        svg.Scale(-0.6, len(names) - 0.4, 0, 1, categories=names),
        label=f"{label} of each method", x_label=f"{label} on the test split, {Goal.of(summary['score']).words}",
        percent_x=formatting.is_share(metric), interactive=False, margins=(24, 20, 44, 210),
    )  # fmt: skip
    for entry in entries:
        colour = "second" if entry["name"] == summary["reference"] else "first"
        group, y, score = svg.element(plot.root, "g", class_=colour), plot.y(entry["name"]), entry["score"]
        whisker(group, (plot.x(score["low"]), y), (plot.x(score["high"]), y))
        svg.element(group, "circle", class_="dot", cx=plot.x(score["value"]), cy=y, r=4)
    return plot.root


def _rates(summary: Summary) -> ET.Element:
    """A small plot for each method: the score by rate; its best one stands out."""
    width, height = _PANEL
    entries = summary["methods"]
    columns = min(_COLUMNS, len(entries))
    lines = -(-len(entries) // columns)
    root = svg.svg_root((width * columns, height * lines), "Scores of each method by learning rate")
    scores = [one["score"] for entry in entries for one in entry["rates"] if one["score"] is not None]
    y = svg.for_scores(scores or [0.0])
    for place, entry in enumerate(entries):
        at = f"translate({width * (place % columns)},{height * (place // columns)})"
        panel = svg.element(root, "g", transform=at)
        panel.extend(_panel(entry, summary, y))
    return root


def _panel(entry: Mapping[str, Any], summary: Summary, y: svg.Scale) -> ET.Element:
    plot = svg.Plot(
        _PANEL, svg.logarithmic([one["rate"] for one in entry["rates"]]), y, label=f"Scores of {entry['name']} by rate",
        x_label=svg.clip(entry["name"], 30), y_label="", interactive=False,
        percent_y=formatting.is_share(summary["objective"]["name"]), margins=(14, 12, 40, 48), ticks=(3, 4),
    )  # fmt: skip
    known = [(one["rate"], one["score"]) for one in entry["rates"] if one["score"] is not None]
    group = svg.element(plot.root, "g", class_="quiet")
    if len(known) > 1:
        svg.line(group, svg.path((plot.x(rate), plot.y(score)) for rate, score in known), "thin")
    for rate, score in known:
        mark = svg.element(plot.root, "g", class_="first" if rate == entry["rate"] else "quiet")
        svg.element(mark, "circle", class_="dot", cx=plot.x(rate), cy=plot.y(score), r=4)
    return plot.root
