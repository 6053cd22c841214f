"""The page of a comparison: one file that holds everything, as the page of a study is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxtune.config.metrics import METRICS, main_metrics
from jaxtune.reports import figures, formatting, headline
from jaxtune.reports.comparison import Side
from jaxtune.reports.page import asset, render_template
from jaxtune.reports.records import read_study

# Of a long prompt its end is shown, where the question stands.
_PROMPT = 600


def render_comparison(result: Mapping[str, Any], sides: Sequence[Side], *, limit: int) -> str:
    """The page as HTML.

    Args:
      result: of :func:`~jaxtune.reports.comparison.comparison`.
      sides: that it was made of; each whole study among them has a section.
      limit: most examples that are shown.
    """
    names = [side.name for side in sides]
    examples = result["side_by_side"][:limit]
    metrics = list(result["runs"][0]["metrics"])
    return render_template(
        "compare.html.j2",
        style=Markup(asset("report.css") + asset("compare.css")),
        title=" · ".join(names),
        names=names,
        origins=[side.origin for side in sides],
        facts=[
            ("Split", f"data.{result['split']}"),
            ("Examples", f"{result['examples']:,}"),
            ("Documents", f"{result['documents']:,}"),
        ],
        verdict=verdict(result),
        metrics=[score_row(result, metric) for metric in metrics],
        confidence=next(
            (one["confidence"] for each in result["differences"] for one in each["metrics"].values() if one["low"]),
            None,
        ),
        percent=formatting.percentage,
        keys={key: list(map(formatting.setting, values)) for key, values in result["keys"].items()},
        with_answers=bool(examples) and "answers" in examples[0],
        differing=sum(row.get("differs", False) for row in result["side_by_side"]),
        examples=[{**row, "prompt": _end(row["prompt"])} for row in examples],
        total=result["examples"],
        loss=lambda value: formatting.score(value, "loss"),
        studies=[_study(side) for side in sides if side.study is not None],
        status_words=figures.STATUS_WORDS,
    )


def _confidence(result: Mapping[str, Any]) -> float | None:
    """Coverage of the intervals; None where there is none."""
    given = (one["confidence"] for entry in result["differences"] for one in entry["metrics"].values())
    return next((confidence for confidence in given if confidence is not None), None)


def score_row(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A metric's scores: of each run its own, its error, and its difference to the first."""
    gains = {entry["run"]: entry["metrics"].get(metric) for entry in result["differences"]}
    cells = [
        {
            "score": formatting.score(run["metrics"].get(metric), metric),
            "error": formatting.difference(error, metric).lstrip("+±")
            if (error := run["standard_errors"].get(metric)) is not None
            else "",
            "gain": interval(gains.get(run["run"]), metric),
            "told": is_told(gains.get(run["run"])),
        }
        for run in result["runs"]
    ]
    return {"name": metric_word(metric), "cells": cells}


def interval(difference: Mapping[str, Any] | None, metric: str) -> str:
    """A difference with its interval, as text; "" where there is none."""
    if difference is None:
        return ""
    text = formatting.difference(difference["difference"], metric)
    if difference["low"] is None:
        return text
    low, high = (formatting.difference(difference[end], metric) for end in ("low", "high"))
    return f"{text} ({low} to {high})"


def is_told(difference: Mapping[str, Any] | None) -> bool:
    """Whether the interval of a difference leaves out 0."""
    if difference is None or difference["low"] is None:
        return False
    return difference["low"] > 0 or difference["high"] < 0


def verdict(result: Mapping[str, Any]) -> str:
    """The page's first sentence: which runs are told from the first, by the task's first metric where there is one."""
    metric = next(name for name in reversed(main_metrics()) if name in result["runs"][0]["metrics"])
    word, goal, first = metric_word(metric), METRICS[metric].goal, result["runs"][0]["run"]
    better, worse, level = [], [], []
    for entry in result["differences"]:
        given = entry["metrics"].get(metric)
        if not is_told(given):
            level.append(entry["run"])
        else:
            (better if goal.better(given["difference"], 0.0) else worse).append(entry["run"])
    told = [
        *([f"{word} of {', '.join(better)} is better than that of {first}"] if better else []),
        *([f"{word} of {', '.join(worse)} is worse than that of {first}"] if worse else []),
        *([f"{word} does not tell {', '.join(level)} from {first}"] if level else []),
    ]
    sentence = "; ".join(told) + "."
    return sentence[0].upper() + sentence[1:]


def metric_word(metric: str) -> str:
    """A metric's name in words; the loss is that of any split."""
    return metric if metric == "loss" else formatting.metric_name(metric)


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= _PROMPT else f"… {prompt[-_PROMPT:]}"


def _study(side: Side) -> dict[str, Any]:
    """A whole study in short: what its own page says first, and how its trials came in."""
    assert side.study is not None
    study = read_study(side.study)
    winner = headline.find_winner(study)
    budget = headline.budget(study)
    return {
        "name": study.name,
        "given": side.name,
        "verdict": headline.verdict(study, winner),
        "facts": [
            ("Trials", f"{len(study.trials)}, {len(study.finished)} finished"),
            ("Objective", f"{formatting.metric_name(study.objective)}, {study.goal.words}"),
            ("Scored after", f"{formatting.percentage(study.fraction)} of the steps"),
            *([("Steps saved", budget["saved"])] if budget else []),
        ],
        "comparison": headline.comparison(study, winner),
        "convergence": figures.convergence(study, winner.trial.id if winner else None),
    }
