"""The page of the transfer study: its table, its findings, its figure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.config.metrics import Goal
from jaxtune.experiments.drawing import bounded, fixed
from jaxtune.experiments.output import markdown_table
from jaxtune.reports import formatting, svg
from jaxtune.reports.formatting import ABSENT

Summary = Mapping[str, Any]

_PANEL = (380, 300)
_COLUMNS = 2


def title(summary: Summary) -> str:
    """The page's title."""
    return f"Choosing in a cheaper setting: {summary['task']}"


def _bounds(figure: Mapping[str, float | None], digits: int = 2) -> str:
    return bounded(figure["value"], figure["low"], figure["high"], digits)


def rows(summary: Summary) -> list[dict[str, str]]:
    """A row for each cheaper setting."""
    return [
        {
            "setting": name,
            "Spearman": _bounds(entry["spearman"]),
            "Kendall": _bounds(entry["kendall"]),
            f"top {summary['top_k']}": _bounds(entry["top_5_overlap"], 0),
            "regret of 1": _bounds(entry["regret"], 3),
            f"regret of {summary['promote']}": _bounds(entry["regret_promoted"], 3),
            "its winner in full": f"{entry['rank_in_full']} of {len(summary['trials'])}",
            "saved": formatting.percentage(round(entry["cost_saved"], 2)),
        }
        for name, entry in summary["settings"].items()
    ]


def findings(summary: Summary) -> list[str]:
    """What the numbers say, in sentences."""
    trials, full = len(summary["trials"]), summary["full"]
    kept = [name for name, entry in summary["settings"].items() if entry["rank_in_full"] == 1]
    said = [_sentence(name, entry, summary) for name, entry in summary["settings"].items()]
    if kept:
        said.insert(0, f"The configuration that is best in {_listed(kept)} is the best in full, too.")
    else:
        said.insert(0, "No other setting has the same best configuration as the full one.")
    said.append(
        f"Scores in the full setting have a standard deviation of {fixed(full['standard_deviation'], 4)} over "
        f"{trials} trials; by chance {summary['top_k'] ** 2 / trials:.1f} of the {summary['top_k']} best would agree."
    )
    return said


def _sentence(name: str, entry: Mapping[str, Any], summary: Summary) -> str:
    """What choosing in one setting comes to."""
    regret = entry["regret"]["value"]
    behind = (
        ", where it diverges" if regret is None or entry["score_in_full"] is None else f", {fixed(regret, 4)} behind"
    )
    if entry["rank_in_full"] == 1:
        behind = ""
    overrides = _listed([f"{key} {formatting.setting(value)}" for key, value in entry["overrides"].items()])
    return (
        f"“{name}” ({overrides}): its winner, trial {entry['chosen']}, is number {entry['rank_in_full']} in "
        f"full{behind}; Spearman {_bounds(entry['spearman'])}."
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def text(summary: Summary) -> list[str]:
    """The page, as Markdown paragraphs."""
    objective, interval, full = summary["objective"], summary["interval"], summary["full"]
    return [
        f"{len(summary['trials'])} configurations of a space-filling design (trial 0 is the reference) were trained to "
        f"their end in the full setting and in {len(summary['settings'])} others. The score is "
        f"{formatting.metric_name(objective['name'])}, {Goal.of(objective).words}. Is the best of a cheaper setting "
        "the best in full?",
        "\n".join(f"- {sentence}" for sentence in findings(summary)),
        markdown_table(rows(summary)),
        f"In brackets: {formatting.percentage(interval['confidence'])} percentile intervals of "
        f"{interval['bootstrap']:,} bootstrap draws of the trials. *Spearman* and *Kendall* (tau-b) correlate the "
        "scores of a setting with those of the full one, over the trials that did not diverge; in *top "
        f"{summary['top_k']}* and *regret* a trial that diverged ranks last. *Regret of 1* is the full score of the "
        f"setting's best trial less the best full score; *regret of {summary['promote']}* that of the best among the "
        f"{summary['promote']} best of the setting. *Saved* is the share of the model FLOPs of training every trial in "
        "full that is saved when all are trained in the setting and its winner once in full. A setting that differs in "
        "the seed alone shows how far the full setting agrees with itself.",
        "![Scores of each setting against the full one](scores.svg)",
        "## Settings",
        markdown_table(_setting_rows(summary)),
        "## Trials",
        markdown_table(_trial_rows(summary)),
        f"Trial {full['best']} is the best in full.",
    ]


def _setting_rows(summary: Summary) -> list[dict[str, str]]:
    every = {"full": {"overrides": {}, "cost": summary["full"]["cost"], "diverged": summary["full"]["diverged"]}}
    return [
        {
            "setting": name,
            "differs in": ", ".join(f"`{key}: {value}`" for key, value in entry["overrides"].items()) or ABSENT,
            "steps": f"{entry['cost']['steps']:,}",
            "model FLOPs": formatting.number(entry["cost"]["flops"], 3),
            "seconds": f"{entry['cost']['seconds']:,.0f}",
            "diverged": str(entry["diverged"]),
        }
        for name, entry in {**every, **summary["settings"]}.items()
    ]


def _trial_rows(summary: Summary) -> list[dict[str, str]]:
    metric = summary["objective"]["name"]
    goal = Goal.of(summary["objective"])
    order = sorted(
        summary["trials"],
        key=lambda trial: float("inf") if trial["scores"]["full"] is None else goal.signed(trial["scores"]["full"]),
    )
    return [
        {
            "trial": str(trial["id"]),
            **{name: formatting.score(score, metric) for name, score in trial["scores"].items()},
            **{key.split(".")[-1]: formatting.setting(value) for key, value in trial["configuration"].items()},
        }
        for trial in order
    ]


def figures(summary: Summary) -> dict[str, ET.Element]:
    """The drawings: file name -> SVG."""
    return {"scores": _scores(summary)}


def _scores(summary: Summary) -> ET.Element:
    """A small plot for each setting: the score there of every trial against its score in full."""
    width, height = _PANEL
    names = list(summary["settings"])
    columns = min(_COLUMNS, len(names))
    lines = (len(names) + columns - 1) // columns
    root = svg.svg_root((width * columns, height * lines), "Scores of each setting against the full one")
    for place, name in enumerate(names):
        panel = svg.element(
            root, "g", transform=f"translate({width * (place % columns)},{height * (place // columns)})"
        )
        panel.extend(_panel(summary, name))
    return root


def _panel(summary: Summary, name: str) -> ET.Element:
    pairs = [
        (trial["id"], trial["scores"][name], trial["scores"]["full"])
        for trial in summary["trials"]
        if trial["scores"][name] is not None and trial["scores"]["full"] is not None
    ]
    share = formatting.is_share(summary["objective"]["name"])
    x, y = (svg.for_scores([pair[axis] for pair in pairs] or [0.0]) for axis in (1, 2))
    plot = svg.Plot(
        _PANEL, x, y, label=f"Scores of {name} against full", x_label=svg.clip(f"score, {name}", 44),
        y_label="score, full", interactive=False, percent_x=share, percent_y=share, margins=(30, 20, 44, 58),
        ticks=(5, 5),
    )  # fmt: skip
    marked = {summary["settings"][name]["chosen"]: "chosen", summary["full"]["best"]: "best", 0: "reference"}
    for number, cheap, full in pairs:
        best = number == summary["full"]["best"]
        colour = "first" if best else "third" if number in marked else "quiet"
        group = svg.element(plot.root, "g", class_=colour)
        at = plot.x(cheap), plot.y(full)
        svg.element(group, "circle", class_="dot", cx=at[0], cy=at[1], r=4)
        if number in marked:
            left = at[0] > (plot.left + plot.right) / 2
            svg.element(
                group, "text", marked[number] if not best or number != summary["settings"][name]["chosen"] else "best",
                class_="name", x=at[0] + (-8 if left else 8), y=at[1] - 8,
                text_anchor="end" if left else "start",
            )  # fmt: skip
    return plot.root
