"""The page of the data-size study: its table, its findings, its figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.config.metrics import Goal
from jaxtune.experiments.drawing import legend, whisker
from jaxtune.experiments.learning_curve import FEWEST_EXAMPLES
from jaxtune.experiments.output import markdown_table
from jaxtune.experiments.saturation import GAP_RULE
from jaxtune.reports import formatting, svg
from jaxtune.reports.formatting import MINUS, SPACE, Number

Summary = Mapping[str, Any]

_SHOWN_GROUPS = 9
_COLUMNS = 3


def title(summary: Summary) -> str:
    """The page's title."""
    return f"How much data is enough: {summary['task']}"


def _unit(summary: Summary) -> str:
    """What the sizes count."""
    return summary.get("unit", "documents")


def _score(value: float, summary: Summary) -> str:
    return formatting.score(value, summary["objective"]["name"])


def _gain(value: float, summary: Summary) -> str:
    """An improvement, positive where the score gets better in its own direction."""
    return formatting.difference(value, summary["objective"]["name"])


def _bounds(figure: Mapping[str, float], write: Any, summary: Summary) -> str:
    """A figure with its interval."""
    return f"{write(figure['value'], summary)} [{write(figure['low'], summary)}, {write(figure['high'], summary)}]"


def rows(summary: Summary) -> list[dict[str, str]]:
    """A row for each size."""
    written = []
    for entry in summary["scores"]:
        trained = entry["size"] > 0
        each = entry["seeds"]
        passes = [seed["passes"] for seed in each] if trained else []
        steps = [seed["best_step"] for seed in each] if trained else []
        row = {
            _unit(summary): f"{entry['size']:,}",
            "examples": f"{entry['examples']:,}",
            "score": _score(entry["mean"], summary),
            "standard error": _error(entry["standard_error"], summary),
            "between seeds": _error(entry["seed_standard_deviation"], summary),
            "best step": _range(steps),
            "passes": _range(passes),
        }
        for name in ("exact_match", "f1"):
            if name != summary["objective"]["name"] and name in each[0]["metrics"]:
                mean = sum(seed["metrics"][name] for seed in each) / len(each)
                row[formatting.metric_name(name)] = formatting.score(mean, name)
        written.append(row)
    return written


def _error(value: float | None, summary: Summary) -> str:
    if value is None:
        return formatting.ABSENT
    share = formatting.is_share(summary["objective"]["name"])
    return f"{100 * value:.1f}{SPACE}%" if share else f"{value:.4f}"


def _range(values: Sequence[Number]) -> str:
    if not values:
        return formatting.ABSENT
    low, high = (formatting.number(round(value, 1), 3) for value in (min(values), max(values)))
    return low if low == high else f"{low} … {high}"


def saturation_sentence(summary: Summary) -> str:
    """Where the gains end, or that they do not end here."""
    size, largest = summary["saturation"], summary["sizes"][-1]
    if size is None:
        return (
            f"Gains have not ended: no size up to {largest:,} {_unit(summary)} is as near to the {_aim(summary)} as "
            "the rule asks."
        )
    if size == 0:
        return (
            f"The untuned model already is as near to the {_aim(summary)} as the rule asks: no gain can be told apart."
        )
    return f"Gains end at {size:,} {_unit(summary)}: {summary['rule']}."


def findings(summary: Summary) -> list[str]:
    """What the numbers say, in sentences; the paper's figures beside ours."""
    first, last, doubling = summary["scores"][0], summary["scores"][-1], summary["next_doubling"]
    said = [
        f"The score goes from {_score(first['mean'], summary)} with {first['size']:,} {_unit(summary)} to "
        f"{_score(last['mean'], summary)} with all {last['size']:,}; the curve's ceiling is "
        f"{_bounds(summary['ceiling'], _score, summary)}.",
        saturation_sentence(summary),
        f"The next doubling, to {doubling['documents']:,}, would improve the score by "
        f"{_bounds(doubling['improvement'], _gain, summary)}.",
    ]
    said += _seen_in_part(summary)
    said += _last_gain(summary)
    said.append(beside_the_paper(summary))
    return said


def _seen_in_part(summary: Summary) -> list[str]:
    """What the length of training leaves open: documents that no step has seen cannot help."""
    parts = [
        entry["size"]
        for entry in summary["scores"]
        if entry["size"] > 0 and max(seed["passes"] for seed in entry["seeds"]) < 1
    ]
    if not parts:
        return []
    return [
        f"From {parts[0]:,} {_unit(summary)} on, training sees only a part of the set in its "
        f"{summary['training']['steps']:,} steps: this is what {_unit(summary)} buy at that length, and longer "
        "training may gain from more of them."
    ]


def _last_gain(summary: Summary) -> list[str]:
    """Whether the last documents bought anything, and which group that came from."""
    before, after = summary["sizes"][-2:]
    total = _improvement(summary)
    if total <= 0:
        return [f"From {before:,} to {after:,} {_unit(summary)} the score did not improve ({_gain(total, summary)})."]
    groups = {name: entry for name, entry in summary["by_attribute"].items() if entry.get("ranked", True)}
    if len(groups) < 2:
        return []
    name, entry = max(groups.items(), key=lambda item: item[1]["last_gain"])
    share, held = entry["last_gain"] / total, entry["train_documents"] / after
    return [
        f"Of the last gain, from {before:,} to {after:,} {_unit(summary)} ({_gain(total, summary)}), the largest part "
        f"is that of “{name}” ({_gain(entry['last_gain'], summary)}, {_percent(share)}), which {_percent(held)} of the "
        f"{_unit(summary)} have."
    ]


def _improvement(summary: Summary) -> float:
    """By how much the largest size is better than the one before."""
    before, after = (entry["mean"] for entry in summary["scores"][-2:])
    return Goal.of(summary["objective"]).gain(before, after)


def _percent(share: float) -> str:
    return formatting.percentage(round(share, 2))


def beside_the_paper(summary: Summary) -> str:
    """The paper's figures and ours; the measures differ, so only the shapes compare."""
    paper, ours = summary["paper"], summary["paper"]["ours"]
    basis = {"measured": "", "curve": " (read off the curve)", "extrapolated": " (beyond our sizes)"}[ours["basis"]]
    part = ours["share_of_gain"]
    share = "" if part is None else f", {_percent(part)} of what all {_unit(summary)} gain"
    size, largest = summary["saturation"], summary["sizes"][-1]
    where = f"not within {largest:,} {_unit(summary)}" if size is None else f"at {size:,} {_unit(summary)}"
    metric = formatting.metric_name(summary["objective"]["name"]).removeprefix("validation ")
    return (
        f"In the paper ({paper['source']}) {paper['samples']} samples lift the {paper['metric']} from "
        f"{_percent(paper['untuned'])} to {_percent(paper['at_samples'])}, and gains end near "
        f"{paper['saturation']:,} samples. Here {paper['samples']} {_unit(summary)} take the {metric} from "
        f"{_score(ours['untuned'], summary)} to {_score(ours['at_samples'], summary)}{basis}{share}, and gains end "
        f"{where}. Model, data and measure are "
        "others, so the shapes compare and the numbers do not."
    )


def text(summary: Summary) -> list[str]:
    """The page, as Markdown paragraphs."""
    interval, objective = summary["interval"], summary["objective"]
    seeds = len(summary["scores"][-1]["seeds"])
    goal = Goal.of(objective)
    name = formatting.metric_name(objective["name"]).removeprefix("validation ")
    drawn = {
        "random": "at random",
        "stratified": "so that every group has about its share of the whole in each of them",
        "balanced": "so that groups are as frequent as one another for as long as there are documents",
    }[summary["sampling"]]
    page = [
        " ".join(findings(summary)),
        f"![Score by number of {_unit(summary)}](curve.svg)",
        markdown_table(rows(summary)),
        f"The score is the {name} on the test split, {goal.words}. Subsets are nested and drawn "
        f"{drawn}, anew for each of {seeds} seeds; {_drawn_and_trained(summary)} The "
        "*standard error* is that of the mean over seeds and test documents, "
        f"*between seeds* the standard deviation of single runs.",
        f"*The curve* is c {'+' if goal.sign > 0 else MINUS} a (n + n0)^{MINUS}b, by least squares "
        f"through the mean scores: c = {formatting.number(summary['ceiling']['value'])}, a = "
        f"{formatting.number(summary['curve']['coefficient'])}, n0 = {formatting.number(summary['curve']['offset'])}, "
        f"b = {formatting.number(summary['curve']['exponent'])}; residuals have a root mean square of "
        f"{formatting.number(summary['curve']['residual'], 2)}. In brackets: "
        f"{formatting.percentage(interval['confidence'])} percentile intervals of {interval['bootstrap']:,} bootstrap "
        f"draws of {interval['over']}; {seeds} seeds are few, so they are rather too narrow than too wide. *Where "
        f"gains end* is {summary['rule']}.",
    ]
    if len(summary["by_attribute"]) > 1:
        page += [
            "## By attribute" if summary["group_by"] == "attribute" else f"## By {summary['group_by']}",
            f"![Score by number of {_unit(summary)}, for each group](groups.svg)",
            markdown_table(_group_rows(summary)),
            "*Last gain* is what the group adds to the improvement of the whole score between the two largest sizes. "
            f"*Gains end* {_group_rule(summary)}",
        ]
    return page


def _drawn_and_trained(summary: Summary) -> str:
    """What a size is, how long it trains, and which of its models is measured."""
    training, examples = summary["training"], _unit(summary) == "examples"
    patience = training["patience"]
    early = f", and ends after {patience} evaluations without a better one" if patience else ""
    rows = f"{training['batch_size']} rows with {training['sequence_length']} positions"
    held = "single examples" if examples else "documents, with all of their examples"
    said = f"what is drawn are {held}."
    if training.get("epochs"):
        said += f" Every size trains {training['epochs']:g} times over its own examples, in steps of {rows}{early}."
    else:
        said += (
            f" Every size trains at most {training['steps']:,} steps of {rows} on one schedule{early}: a small set is "
            "repeated, of a large one a part may stay unseen (*passes*)."
        )
    if training["evaluate_every"] is None:
        return f"{said} The model at its end is measured."
    return (
        f"{said} Each run is evaluated on the validation split every {training['evaluate_every']} steps, and the model "
        "of its best evaluation is measured."
    )


def _group_rule(summary: Summary) -> str:
    """What a group's size at which gains end is, and which groups are too small to be compared."""
    said = (
        "is the smallest size within a standard error of the ceiling of the group's own curve (– where there is none)."
        if summary["rule"] == GAP_RULE
        else "follows the rule above with the group's own curve and standard errors (– where no size is near enough)."
    )
    if all(entry.get("ranked", True) for entry in summary["by_attribute"].values()):
        return said
    return f"{said} Groups with fewer than {FEWEST_EXAMPLES} test examples that count are not ranked."


def _aim(summary: Summary) -> str:
    """What the rule compares a size with."""
    return f"score of {summary['sizes'][-1]:,}" if summary["rule"] == GAP_RULE else "fitted ceiling"


def _group_rows(summary: Summary) -> list[dict[str, str]]:
    sizes = summary["sizes"]
    shown = [0, len(sizes) // 2, len(sizes) - 2, len(sizes) - 1]
    return [
        {
            "group": name,
            f"train {_unit(summary)}": f"{entry['train_documents']:,}",
            "test examples": f"{entry['examples']:,}",
            **{f"at {sizes[place]:,}": _score(entry["scores"][place], summary) for place in dict.fromkeys(shown)},
            "last gain": _gain(entry["last_gain"], summary),
            "ceiling": _score(entry["ceiling"], summary),
            "gains end": formatting.ABSENT if entry["saturation"] is None else f"{entry['saturation']:,}",
        }
        for name, entry in summary["by_attribute"].items()
    ]


def figures(summary: Summary) -> dict[str, ET.Element]:
    """The drawings: file name -> SVG."""
    drawn = {"curve": _curve(summary)}
    if len(summary["by_attribute"]) > 1:
        drawn["groups"] = _groups(summary)
    return drawn


def _documents_scale(values: Sequence[Number]) -> svg.Scale:
    return svg.logarithmic([0.0, *values])


def _score_scale(summary: Summary, values: Sequence[Number]) -> svg.Scale:
    if formatting.is_share(summary["objective"]["name"]):
        return svg.linear(values, lowest=0.0)
    # An untuned model's loss would press all the others onto a line.
    return svg.logarithmic(values) if min(values) > 0 and max(values) / min(values) > 3 else svg.linear(values)


def _label(summary: Summary, scale: svg.Scale) -> str:
    objective = summary["objective"]
    name = formatting.metric_name(objective["name"]).replace("validation", "test")
    return f"{name}, {Goal.of(objective).words}{' (log scale)' if scale.base else ''}"


def _curve(summary: Summary) -> ET.Element:
    """Means with their errors, single seeds, the fitted curve with its band, and the ceiling."""
    curve, ceiling = summary["curve"], summary["ceiling"]
    points = [(entry["size"], entry["mean"], entry["standard_error"]) for entry in summary["scores"]]
    runs = [(entry["size"], seed["score"]) for entry in summary["scores"] for seed in entry["seeds"]]
    ends = [value for _, mean, error in points for value in (mean - error, mean + error)]
    every = [*ends, *(score for _, score in runs), *curve["low"], *curve["high"], ceiling["value"]]
    # A loss near 0 on a logarithmic scale would push everything else together.
    y = _score_scale(summary, [value for value in every if value > 0] or every)
    positive = [value for value in curve["documents"] if value > 0]
    plot = svg.Plot(
        (920, 420), _documents_scale(positive), y, label=f"Score by number of training {_unit(summary)}",
        x_label=f"training {_unit(summary)} (log scale, 0 at the left)", y_label=_label(summary, y), interactive=False,
        percent_y=formatting.is_share(summary["objective"]["name"]), margins=(50, 24, 44, 62),
    )  # fmt: skip
    _draw_curve(plot, curve)
    at = plot.y(ceiling["value"]) if ceiling["value"] > 0 or not y.base else plot.bottom
    svg.element(plot.root, "line", class_="guide", x1=plot.left, x2=plot.right, y1=at, y2=at)
    svg.element(plot.root, "text", "ceiling", class_="name", x=plot.right - 4, y=at - 6, text_anchor="end")
    singles = svg.element(plot.root, "g", class_="quiet")
    for size, score in runs:
        svg.element(singles, "circle", class_="dot", cx=plot.x(size), cy=plot.y(score), r=2.5)
    _draw_means(plot, points)
    if summary["saturation"]:
        x = plot.x(summary["saturation"])
        svg.element(plot.root, "line", class_="guide", x1=x, x2=x, y1=plot.top, y2=plot.bottom)
        svg.element(plot.root, "text", "gains end", class_="name", x=x + 6, y=plot.top + 12)
    meanings = [("first", "mean ± standard error"), ("quiet", "one seed"), ("second", "fitted curve with its interval")]
    for place, (colour, words) in enumerate(meanings):
        legend(plot.root, words, colour, plot.left + 190.0 * place + 5, 36.0)
    return plot.root


def _draw_curve(plot: svg.Plot, curve: Mapping[str, Any]) -> None:
    """The fitted curve and its band; 0 documents lie at the left end of the axis."""
    floor = plot.y.low

    def place(values: Sequence[Number]) -> list[tuple[float, float]]:
        pairs = zip(curve["documents"], values, strict=True)
        return [(plot.x(size), plot.y(max(value, floor))) for size, value in pairs]

    group = svg.element(plot.root, "g", class_="second")
    outline = svg.path([*place(curve["low"]), *reversed(place(curve["high"]))], close=True)
    svg.element(group, "path", class_="band", d=outline)
    svg.line(group, svg.path(place(curve["values"])), "thin")


def _draw_means(plot: svg.Plot, points: Sequence[tuple[Number, Number, Number]]) -> None:
    group = svg.element(plot.root, "g", class_="first")
    for size, mean, error in points:
        x = plot.x(size)
        low, high = (plot.y(min(max(end, plot.y.low), plot.y.high)) for end in (mean - error, mean + error))
        whisker(group, (x, low), (x, high))
        svg.element(group, "circle", class_="dot", cx=x, cy=plot.y(mean), r=4)


def _groups(summary: Summary) -> ET.Element:
    """A small plot for each of the groups with the most test examples, all on one scale."""
    shown = list(summary["by_attribute"].items())[:_SHOWN_GROUPS]
    # The untuned model is so far off that all else would lie on a line.
    curves = {
        name: [
            point
            for point in zip(summary["sizes"], entry["scores"], entry["standard_errors"], strict=True)
            if point[0] > 0
        ]
        for name, entry in shown
    }
    every = [end for points in curves.values() for _, score, error in points for end in (score - error, score + error)]
    y = _score_scale(summary, [value for value in every if value > 0] or every)
    width, height = 306, 220
    lines = (len(shown) + _COLUMNS - 1) // _COLUMNS
    label = f"Score by number of training {_unit(summary)} above 0, for each group"
    root = svg.svg_root((width * min(_COLUMNS, len(shown)), height * lines), label)
    for place, (name, entry) in enumerate(shown):
        plot = svg.Plot(
            (width, height), svg.logarithmic([size for size, _, _ in curves[name]]), y, label=f"{name}: score by size",
            x_label=f"training {_unit(summary)}", y_label=f"{svg.clip(name, 24)} ({entry['train_documents']:,})",
            interactive=False, percent_y=formatting.is_share(summary["objective"]["name"]),
            margins=(26, 14, 44, 52), ticks=(4, 4),
        )  # fmt: skip
        points = curves[name]
        group = svg.element(plot.root, "g", class_="first")
        svg.line(group, svg.path((plot.x(size), plot.y(score)) for size, score, _ in points), "thin")
        _draw_means(plot, points)
        panel = svg.element(
            root, "g", transform=f"translate({width * (place % _COLUMNS)},{height * (place // _COLUMNS)})"
        )
        panel.extend(plot.root)
    return root
