"""The page of the ablation: its table, its findings, its figure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from jaxtune.config.metrics import Goal
from jaxtune.experiments.drawing import bounded, fixed, legend, whisker
from jaxtune.experiments.output import markdown_table
from jaxtune.reports import formatting, svg

Summary = Mapping[str, Any]

_SPLITS = (("validation", "first", -5.0), ("test", "second", 5.0))
_EVERYTHING = "all of them"


def title(summary: Summary) -> str:
    """The page's title."""
    return f"Which hyperparameters mattered: {summary['task']}"


def rows(summary: Summary) -> list[dict[str, str]]:
    """A row for each key that was set back, the one that mattered most first, and one for all together, if any was."""
    if not summary["effects"]:
        return []
    entries = [
        {"set back": entry["key"], "winner": formatting.setting(entry["winner"]),
         "reference": formatting.setting(entry["reference"]), **_measures(entry)}
        for entry in summary["effects"]
    ]  # fmt: skip
    if summary["whole"] is not None:
        entries.append({"set back": _EVERYTHING, "winner": "", "reference": "", **_measures(summary["whole"])})
    return entries


def _measures(entry: Mapping[str, Any]) -> dict[str, str]:
    shown = {split: _bounds(entry[split]) for split, _, _ in _SPLITS if split in entry}
    return {**shown, "verdict": entry["verdict"]}


def _bounds(measured: Mapping[str, Any]) -> str:
    text = bounded(measured["difference"], measured["low"], measured["high"], 4, signed=True)
    return f"{text} ({measured['diverged']} diverged)" if measured["diverged"] else text


def findings(summary: Summary) -> list[str]:
    """What the numbers say, in sentences."""
    search = summary["search"]
    if summary["whole"] is None:
        return [f"None of the search's {search['trials']} trials beat the reference, so there is nothing to set back."]
    by_verdict = {
        verdict: [entry["key"] for entry in summary["effects"] if entry["verdict"] == verdict]
        for verdict in ("mattered", "harmful", "negligible", "unclear")
    }
    said = [_sentence(by_verdict["mattered"], "made the winner: without it the score is worse", "no single key")]
    if by_verdict["harmful"]:
        said.append(_sentence(by_verdict["harmful"], "did harm: the reference's value is better", ""))
    if by_verdict["negligible"]:
        less = f"less than {formatting.percentage(summary['material'])} of what winner and reference differ by"
        said.append(_sentence(by_verdict["negligible"], f"changed the score by {less}", ""))
    if by_verdict["unclear"]:
        said.append(_sentence(by_verdict["unclear"], "cannot be told from no effect", ""))
    whole = summary["whole"]["validation"]
    if whole["difference"] is not None:
        said.append(f"Over these seeds the reference scores {_bounds(whole)} against the winner.")
        if search["reference"] is not None:
            measured = fixed(search["reference"] - search["final_score"], 4, signed=True)
            said.append(f"The search, with its own seed, had measured {measured}.")
    return said


def _sentence(keys: list[str], words: str, nothing: str) -> str:
    text = ", ".join(f"`{key}`" for key in keys) or nothing
    return f"{text[0].upper()}{text[1:]} {words}."


def text(summary: Summary) -> list[str]:
    """The page, as Markdown paragraphs."""
    objective, interval, seeds = summary["objective"], summary["interval"], summary["seeds"]
    effects = summary["effects"]
    page = [
        f"The winner of a search over {summary['search']['trials']} trials (trial {summary['search']['trial']}) was "
        f"trained again with each of its hyperparameters set back to the reference's value by itself, to the end, with "
        f"{len(seeds)} seeds{_strange(summary)}. The score is {formatting.metric_name(objective['name'])}, "
        f"{Goal.of(objective).words}.",
        " ".join(findings(summary)),
    ]
    if not effects:
        return page
    page += [
        markdown_table(rows(summary)),
        "The score with the key set back less the winner's, seed by seed: the mean, and in brackets Student's "
        f"{formatting.percentage(interval['confidence'])} interval over the {len(seeds)} seeds. *Mattered*: the "
        "interval on the validation split lies on the worse side of zero; *harmful*: on the better side; *negligible*: "
        f"on either, but less than {formatting.percentage(summary['material'])} of what winner and reference differ "
        f"by. Of {len(effects)} such intervals {len(effects) * (1 - interval['confidence']):.1f} miss zero by chance. "
        "Effects of single keys need not add up to that of all: hyperparameters work together.",
        "![What each key set back does to the score](effects.svg)",
    ]
    if unchanged := summary["unchanged"]:
        page.append("Equal in winner and reference: " + ", ".join(f"`{key}`" for key in unchanged) + ".")
    return page


def _strange(summary: Summary) -> str:
    """Whether the search has seen the seeds: it favours a winner that was lucky with its own."""
    return ", one of them the search's own" if summary["search"]["seed"] in summary["seeds"] else " new to the search"


def figures(summary: Summary) -> dict[str, ET.Element]:
    """The drawings: file name -> SVG."""
    return {"effects": _effects(summary)} if summary["effects"] else {}


def _effects(summary: Summary) -> ET.Element:
    """Differences with their intervals, a line for each key."""
    entries = {entry["key"]: entry for entry in summary["effects"]} | {_EVERYTHING: summary["whole"]}
    splits = [split for split in _SPLITS if split[0] in summary["whole"]]
    names = tuple(reversed(entries))
    known = [
        value
        for entry in entries.values()
        for split, _, _ in splits
        for value in (entry[split]["difference"], entry[split]["low"], entry[split]["high"])
        if value is not None
    ]
    metric = summary["objective"]["name"]
    plot = svg.Plot(
        (920, 110 + 34 * len(names)), svg.linear([0.0, *known]),
        svg.Scale(-0.6, len(names) - 0.4, 0, 1, categories=names),
        label="What setting each hyperparameter back to the reference does to the score",
        x_label=f"change of {formatting.metric_name(metric).removeprefix('validation ')}",
        percent_x=formatting.is_share(metric), interactive=False, margins=(40, 20, 44, 210),
    )  # fmt: skip
    zero = plot.x(0.0)
    svg.element(plot.root, "line", class_="guide", x1=zero, x2=zero, y1=plot.top, y2=plot.bottom)
    for place, (split, colour, shift) in enumerate(splits):
        legend(plot.root, split, colour, plot.left + 10 + 100 * place, 24.0)
        group = svg.element(plot.root, "g", class_=colour)
        for name, entry in entries.items():
            measured, y = entry[split], plot.y(name) + shift
            if measured["difference"] is None:
                continue
            if measured["low"] is not None:
                whisker(group, (plot.x(measured["low"]), y), (plot.x(measured["high"]), y))
            svg.element(group, "circle", class_="dot", cx=plot.x(measured["difference"]), cy=y, r=4)
    return plot.root
