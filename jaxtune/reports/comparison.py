"""Runs beside each other: scores with paired intervals, the settings that differ, answers to the same questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import Config, dotted
from jaxtune.errors import UserError
from jaxtune.evaluation import EvaluatorResult, PairedDifference, normalize, paired_bootstrap
from jaxtune.training.predictions import Predictions
from jaxtune.training.run_directory import different_keys


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the compared.

    Attributes:
      name: as it was given.
      origin: what it is, for people.
      config: of the run or the trial.
      study: the directory of the study that it is the winner of; None where it was not given as a whole study.
      predictions: on the split.
    """

    name: str
    origin: str
    config: Config
    study: Path | None
    predictions: Predictions


@dataclasses.dataclass(frozen=True)
class Asked:
    """One side's questions: what must be the same for scores to compare.

    Attributes:
      name: as it was given.
      config: of the run or the trial.
      rows: of the split, see :func:`~jaxtune.training.predictions.row_identities`.
    """

    name: str
    config: Config
    rows: Sequence[str]


def check_alike(sides: Sequence[Asked], split: str) -> None:
    """Refuses to compare what was asked other questions.

    Args:
      sides: at least two.
      split: that they are evaluated on.

    Raises:
      UserError: a task, the number of questions or a row differs from those of the first; names which.
    """
    first = sides[0]
    for other in sides[1:]:
        here, there = first.config.evaluation, other.config.evaluation
        if here.task != there.task:
            raise UserError(
                f"evaluation.task: {first.name} has {here.task!r} and {other.name} {there.task!r}; runs of different "
                "tasks do not compare"
            )
        if here.task != "none" and here.limit != there.limit:
            raise UserError(
                f"evaluation.limit: {first.name} has {here.limit} and {other.name} {there.limit}, so other questions; "
                "give all the same: evaluation.limit=…"
            )
        if first.rows == other.rows:
            continue
        common = zip(first.rows, other.rows, strict=False)
        at = next((number for number, (one, two) in enumerate(common) if one != two), None)
        where = f"the first that differs is number {at}" if at is not None else "one is the beginning of the other"
        raise UserError(
            f"data.{split}: {first.name} has {len(first.rows):,} examples and {other.name} {len(other.rows):,}, and "
            f"{where}; runs compare on the same rows alone: give them the same data, or name another --split"
        )


def differences(first: Predictions, other: Predictions) -> dict[str, dict[str, Any]]:
    """How much more another run scored than the first, by metric, over the same examples.

    Documents are drawn together (:func:`~jaxtune.evaluation.paired_bootstrap`). Where the weights of examples depend on
    the answers, as those of F1 and of precision do, two runs have none in common, and the difference has no interval.

    Returns:
      Metric -> ``difference``, and ``low``, ``high`` of the interval with its ``confidence``, or None for all three. No
      entry for a loss over other tokens (of another tokenizer or prompt form).
    """
    paired: dict[str, PairedDifference] = {}
    same_tokens = first.tokens == other.tokens
    losses, more, tokens = (np.asarray(values) for values in (first.losses, other.losses, first.tokens))
    if same_tokens and np.isfinite([losses, more]).all():
        paired["loss"] = paired_bootstrap(more, losses, tokens, clusters=first.documents)
    one, two = (EvaluatorResult(each.metrics, each.standard_errors, {}, each.records) for each in (first, other))
    for name in first.metrics if first.records else ():
        if not (mine := {} if name == "loss" else one.per_example(name)) or not any(mine["weights"]):
            continue
        more, values, weights = (
            np.asarray(each) for each in (two.per_example(name)["per_example"], mine["per_example"], mine["weights"])
        )
        paired[name] = paired_bootstrap(more, values, weights, strata=mine["strata"], clusters=mine["clusters"])
    compared = [name for name in first.metrics if name in other.metrics and (name != "loss" or same_tokens)]
    nothing = {"low": None, "high": None, "confidence": None}
    return {
        name: {"difference": paired[name].difference, **{key: getattr(paired[name], key) for key in nothing}}
        if name in paired
        else {"difference": other.metrics[name] - first.metrics[name], **nothing}
        for name in compared
    }


def settings(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """The configuration keys in which any two differ, with the value of each."""
    values = [dotted(side.config) for side in sides]
    keys = sorted({key for other in values[1:] for key in different_keys(values[0], other)} - {"name"})
    return {key: [value.get(key) for value in values] for key in keys}


def side_by_side(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Every question with the answers of all, those first that some got right and some wrong, then other differences.

    Returns:
      ``example`` (its place), ``document``, ``attribute``, ``prompt``, ``reference``, ``answers`` and ``correct`` (a
      list, one of each side), ``differs``. Without a task there are no answers: ``losses`` per token instead, those
      first that lie farthest apart.
    """
    first = sides[0].predictions
    if not first.records:
        rows = [
            {
                "example": place,
                "document": first.documents[place],
                "prompt": first.prompts[place],
                "reference": first.completions[place],
                "losses": [
                    side.predictions.losses[place] / side.predictions.tokens[place]
                    if side.predictions.tokens[place]
                    else None
                    for side in sides
                ],
            }
            for place in range(len(first.losses))
        ]
        return sorted(rows, key=lambda row: -_spread(row["losses"]))
    rows = []
    for place, record in enumerate(first.records):
        each = [side.predictions.records[place] for side in sides]
        answers, correct = ([one[name] for one in each] for name in ("prediction", "correct"))
        rows.append(
            {
                "example": place,
                **{name: record[name] for name in ("document", "attribute", "prompt", "reference")},
                "answers": answers,
                "correct": correct,
                "differs": len({normalize(answer) for answer in answers}) > 1,
            }
        )
    return sorted(rows, key=lambda row: (len(set(row["correct"])) == 1, not row["differs"]))


def _spread(losses: Sequence[float | None]) -> float:
    known = [loss for loss in losses if loss is not None]
    return max(known) - min(known) if known else 0.0


def comparison(sides: Sequence[Side], split: str) -> dict[str, Any]:
    """All that is compared, as values that go into JSON.

    Args:
      sides: at least two, that :func:`check_alike` let pass; the first is what the others are compared with.
      split: that they were evaluated on.
    """
    first = sides[0].predictions
    asked = first.records or first.losses
    documents = {record["document"] for record in first.records} if first.records else set(first.documents)
    return {
        "split": split,
        "examples": len(asked),
        "documents": len(documents),
        "runs": [
            {
                "run": side.name,
                "subject": side.origin,
                "metrics": side.predictions.metrics,
                "standard_errors": side.predictions.standard_errors,
            }
            for side in sides
        ],
        "differences": [
            {"run": side.name, "against": sides[0].name, "metrics": differences(first, side.predictions)}
            for side in sides[1:]
        ],
        "keys": settings(sides),
        "side_by_side": side_by_side(sides),
    }
