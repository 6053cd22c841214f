"""The page of the early-score experiment: its tables, its findings, its figures."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.config.metrics import Goal
from jaxtune.experiments.drawing import bounded, fixed, legend, whisker
from jaxtune.experiments.output import markdown_table
from jaxtune.reports import formatting, svg

Summary = Mapping[str, Any]

_PANEL = (460, 300)


def title(summary: Summary) -> str:
    """The page's title."""
    return f"Early scores against final ones: {summary['task']}"


def _bounds(figure: Mapping[str, float | None], digits: int = 2) -> str:
    return bounded(figure["value"], figure["low"], figure["high"], digits)


def _percent(name: str) -> str:
    return formatting.percentage(float(name))


def rows(summary: Summary) -> list[dict[str, str]]:
    """A row for each fraction."""
    return [
        {
            "steps": _percent(name),
            "Spearman": _bounds(entry["spearman"]),
            "Kendall": _bounds(entry["kendall"]),
            f"top {summary['top_k']}": _bounds(entry["top_5_overlap"], 0),
            "regret of 1": _bounds(entry["regret"], 3),
            f"regret of {summary['promote']}": _bounds(entry["regret_promoted"], 3),
            f"saved (1, {summary['promote']})": f"{entry['steps_saved']:.0%}, {entry['steps_saved_promoted']:.0%}",
        }
        for name, entry in summary["by_fraction"].items()
    ]


def findings(summary: Summary) -> list[str]:
    """What the numbers say, in sentences; the paper's figure beside ours."""
    paper, final, k = summary["paper"], summary["final"], summary["top_k"]
    trials = len(summary["trials"])
    at = _percent(paper["fraction"])
    claim = f"In the paper {paper['top_5_overlap']} of the {k} best at {at} are among the {k} best at the end"
    said = [f"{claim} ({paper['source']})."]
    entry = summary["by_fraction"].get(paper["fraction"])
    if entry is None:
        said.append(f"This experiment was not scored at {at}.")
    else:
        overlap = entry["top_5_overlap"]
        said.append(f"Here it is {_bounds(overlap, 0)} of {k}: {_verdict(overlap, paper['top_5_overlap'])}.")
        said += _regrets(entry, at, summary["promote"])
    said += _beside(summary)
    said.append(f"Final scores have a standard deviation of {fixed(final['standard_deviation'], 4)} over trials.")
    said.append(f"By chance {k * k / trials:.1f} of {k} would agree. {final['diverged']} of {trials} trials diverged.")
    return said


def _beside(summary: Summary) -> list[str]:
    """What the overlap is to be seen against: a guess by the learning rate, other metrics, other designs."""
    paper, k, said = summary["paper"], summary["top_k"], []
    if summary.get("rate_alone") is not None:
        said.append(
            f"Who knows nothing but the learning rate, and how all other trials end, finds "
            f"{summary['rate_alone']['overlap']} of the {k} best."
        )
    for metric, entry in summary.get("by_metric", {}).items():
        name = formatting.metric_name(metric)
        at = entry["by_fraction"].get(paper["fraction"])
        if at is None:
            continue
        if at["zeros"] > 0.5:
            said.append(
                f"In {name} the claim cannot be tested at this length: at {_percent(paper['fraction'])} it is 0 for "
                f"{formatting.percentage(at['zeros'])} of the trials."
            )
        else:
            said.append(f"By {name} the overlap is {_bounds(at['top_5_overlap'], 0)}.")
    return said


def _regret_interval(summary: Summary) -> list[str]:
    """What the interval of a regret is, where it is no plain percentile interval."""
    if summary["interval"].get("regret") != "calibrated":
        return []
    return [
        "The interval of a *regret* is one for its mean over designs of this size: the wider ends of two bootstraps, "
        "of single draws and of means over designs drawn from a draw, both calibrated. How often it covers is measured "
        "by `benchmarks/regret_coverage.py`."
    ]


def _size_rows(summary: Summary) -> list[dict[str, str]]:
    """A row for each number of trials."""
    claimed = summary["paper"]["top_5_overlap"]
    rows = []
    for place, entry in enumerate(summary["by_design_size"]):
        row = {
            "trials": str(entry["trials"]),
            "expected overlap": fixed(entry["expected"], 1),
            f"{claimed} or more": formatting.percentage(round(entry["reaches"], 2)),
            "by chance": fixed(entry["by_chance"], 1),
        }
        for metric, other in summary.get("by_metric", {}).items():
            row[f"expected, {formatting.metric_name(metric)}"] = fixed(other["by_design_size"][place]["expected"], 1)
        rows.append(row)
    return rows


def _metric_rows(entry: Mapping[str, Any], summary: Summary) -> list[dict[str, str]]:
    """A row for each fraction, of a metric that ranked no trial."""
    return [
        {
            "steps": _percent(name),
            "0": formatting.percentage(round(figures["zeros"], 2)),
            "Spearman": _bounds(figures["spearman"]),
            f"top {summary['top_k']}": _bounds(figures["top_5_overlap"], 0),
        }
        for name, figures in entry["by_fraction"].items()
    ]


def _further_text(summary: Summary) -> list[str]:
    """Other metrics of the same trials, and what the design's size does."""
    said = []
    for metric, entry in summary.get("by_metric", {}).items():
        name = formatting.metric_name(metric)
        said += [
            f"## By {name}",
            "Measured of the same trials at the same steps; it ranked none of them. *0* is the share of trials for "
            "which it was 0: between those there is no order to agree with.",
            markdown_table(_metric_rows(entry, summary)),
        ]
    if summary.get("by_design_size") is not None:
        said += [
            f"## In designs of other sizes, at {_percent(summary['paper']['fraction'])}",
            f"How many of the {summary['top_k']} best agree depends on how many trials there are. Expected in designs "
            "of so many of these trials, drawn without replacement, equal scores in random order:",
            markdown_table(_size_rows(summary)),
        ]
    return said


def _regrets(entry: Mapping[str, Any], at: str, promote: int) -> list[str]:
    one, several = entry["regret"]["value"], entry["regret_promoted"]["value"]
    if one is None:
        said = [f"The best trial at {at} diverged before its end."]
    else:
        said = [f"Finishing the best trial at {at} alone ends {fixed(one, 4)} from the best of all."]
    if several is not None:
        said.append(f"Finishing the best {promote} ends {fixed(several, 4)} from it.")
    return said


def _verdict(overlap: Mapping[str, float], claimed: int) -> str:
    value, low, high = (overlap[key] for key in ("value", "low", "high"))
    if low >= claimed:
        return "the claim holds"
    if value >= claimed:
        return f"as many as claimed, though another design of this size might give as few as {low:.0f}"
    if high >= claimed:
        return "fewer than claimed, though the interval does not exclude it"
    return f"the claim does not hold (at most {high:.0f} at this confidence, from {low:.0f})"


def text(summary: Summary) -> list[str]:
    """The page, as Markdown paragraphs."""
    objective, interval = summary["objective"], summary["interval"]
    promote = summary["promote"]
    return [
        f"All {len(summary['trials'])} configurations of a space-filling design (trial 0 is the reference) were "
        f"trained to their end and scored on the way. The score is {formatting.metric_name(objective['name'])}, "
        f"{Goal.of(objective).words}. How much of the final order is there early?",
        " ".join(findings(summary)),
        markdown_table(rows(summary)),
        f"In brackets: {formatting.percentage(interval['confidence'])} percentile intervals of "
        f"{interval['bootstrap']:,} bootstrap draws of the trials, which tell how much hangs on the trials that the "
        "design happens to hold. *Spearman* and *Kendall* (tau-b, average ranks for ties) correlate the score at the "
        "fraction with the final one, over the trials that did not diverge; in *top "
        f"{summary['top_k']}* and *regret* a trial that diverged ranks last, and of equal scores the earlier trial "
        "comes first. *Regret of 1* is the final score of the trial that is best at the fraction, less the best final "
        f"score; *regret of {promote}* that of the best among the {promote} that a search would finish. *Saved* is the "
        "share of all steps that is not trained when all others stop at the fraction.",
        *_regret_interval(summary),
        "![Agreement by fraction](agreement.svg)",
        "![Scores by fraction](scores.svg)",
        *_further_text(summary),
        "## Trials",
        markdown_table(_trial_rows(summary)),
    ]


def _trial_rows(summary: Summary) -> list[dict[str, str]]:
    metric = summary["objective"]["name"]
    goal = Goal.of(summary["objective"])
    order = sorted(
        summary["trials"],
        key=lambda trial: math.inf if trial["final_score"] is None else goal.signed(trial["final_score"]),
    )
    return [
        {
            "trial": str(trial["id"]),
            **{_percent(name): formatting.score(score, metric) for name, score in trial["scores"].items()},
            **{key.split(".")[-1]: formatting.setting(value) for key, value in trial["configuration"].items()},
        }
        for trial in order
    ]


def figures(summary: Summary) -> dict[str, ET.Element]:
    """The drawings: file name -> SVG."""
    return {"agreement": _agreement(summary), "scores": _scores(summary)}


def _fraction_scale(names: Sequence[str]) -> svg.Scale:
    """Fractions side by side, at equal distances."""
    return svg.Scale(-0.3, len(names) - 0.7, 0, 1, categories=tuple(map(_percent, names)))


def _agreement(summary: Summary) -> ET.Element:
    """Correlations and overlap by fraction, with their intervals."""
    by_fraction = summary["by_fraction"]
    panels = [
        (
            "rank correlation with the final score",
            [("spearman", "Spearman", "first"), ("kendall", "Kendall", "second")],
        ),
        (
            f"of the best {summary['top_k']}, how many are among the final best {summary['top_k']}",
            [("top_5_overlap", "", "first")],
        ),
    ]
    width, height = _PANEL
    root = svg.svg_root((width * len(panels), height), "Agreement of early with final order, by fraction of the steps")
    for place, (label, lines) in enumerate(panels):
        every = [
            value for name, _, _ in lines for entry in by_fraction.values()
            for value in entry[name].values() if value is not None
        ]  # fmt: skip
        top = float(summary["top_k"]) if lines[0][0] == "top_5_overlap" else 1.0
        plot = svg.Plot(
            _PANEL, _fraction_scale(list(by_fraction)), svg.Scale(min(0.0, *every), top * 1.04, 0, 1),
            label=label, x_label="share of the steps", y_label=label, interactive=False, margins=(30, 20, 44, 44),
            ticks=(8, 6),
        )  # fmt: skip
        for shift, (name, words, colour) in enumerate(lines):
            _line(plot, by_fraction, name, colour, (shift - (len(lines) - 1) / 2) * 8)
            if words:
                legend(plot.root, words, colour, plot.right - 84, plot.bottom - 34 + 18 * shift)
        if lines[0][0] == "top_5_overlap":
            _paper_mark(plot, summary)
        panel = svg.element(root, "g", transform=f"translate({place * width},0)")
        panel.extend(plot.root)
    return root


def _line(plot: svg.Plot, by_fraction: Mapping[str, Any], name: str, colour: str, shift: float) -> None:
    """A figure by fraction: dots with whiskers, joined."""
    group = svg.element(plot.root, "g", class_=colour, transform=f"translate({shift:.1f},0)")
    known = [
        (plot.x(_percent(fraction)), entry[name])
        for fraction, entry in by_fraction.items()
        if entry[name]["value"] is not None
    ]
    svg.line(group, svg.path((x, plot.y(figure["value"])) for x, figure in known), "thin")
    for x, figure in known:
        if figure["low"] is not None:
            whisker(group, (x, plot.y(figure["low"])), (x, plot.y(figure["high"])))
        svg.element(group, "circle", class_="dot", cx=x, cy=plot.y(figure["value"]), r=4)


def _paper_mark(plot: svg.Plot, summary: Summary) -> None:
    """The paper's figure, as a ring."""
    paper = summary["paper"]
    if paper["fraction"] not in summary["by_fraction"]:
        return
    x, y = plot.x(_percent(paper["fraction"])), plot.y(paper["top_5_overlap"])
    group = svg.element(plot.root, "g", class_="third")
    svg.element(group, "circle", cx=x, cy=y, r=8, class_="stroke")
    svg.element(group, "text", "paper", class_="name", x=x - 12, y=y - 8, text_anchor="end")


def _scores(summary: Summary) -> ET.Element:
    """The score of every trial by fraction; the leading ones of the end stand out."""
    names = list(summary["by_fraction"])
    metric, k = summary["objective"]["name"], summary["top_k"]
    goal = Goal.of(summary["objective"])
    finished = sorted(
        (trial for trial in summary["trials"] if trial["final_score"] is not None),
        key=lambda trial: goal.signed(trial["final_score"]),
    )
    leading = {trial["id"] for trial in finished[:k]}
    every = [score for trial in summary["trials"] for score in trial["scores"].values() if score is not None]
    y = svg.for_scores(every)
    label = f"{formatting.metric_name(metric)}, {goal.words}{' (log scale)' if y.base else ''}"
    plot = svg.Plot(
        (920, 380), _fraction_scale(names), y, label="Score of every trial by fraction of the steps",
        x_label="share of the steps", y_label=label, percent_y=formatting.is_share(metric), interactive=False,
        margins=(48, 20, 44, 58),
    )  # fmt: skip
    for trial in sorted(summary["trials"], key=lambda trial: trial["id"] in leading):
        points = [(_percent(name), score) for name, score in trial["scores"].items() if score is not None]
        colour = "first" if trial["id"] in leading else "quiet thin"
        if trial["id"] == 0:
            colour += " dashed"
        group = svg.element(plot.root, "g", class_=colour)
        if len(points) > 1:
            svg.line(group, svg.path((plot.x(x), plot.y(value)) for x, value in points), colour)
        for x, value in points:
            svg.element(group, "circle", class_="dot", cx=plot.x(x), cy=plot.y(value), r=2.5)
    key = [
        ("first", f"among the best {k} at the end"),
        ("quiet thin", "the others"),
        ("quiet thin dashed", "reference"),
    ]
    for place, (colour, words) in enumerate(key):
        x = plot.left + place * 210.0
        group = svg.element(plot.root, "g", class_=colour)
        svg.line(group, svg.path([(x, 32.0), (x + 22, 32.0)]), colour)
        svg.element(group, "text", words, x=x + 28, y=36)
    return plot.root
