"""Comparisons of predictions that are known: what is told from what, and what a page says of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxtune.config import Config
from jaxtune.errors import UserError
from jaxtune.evaluation import extraction_metrics
from jaxtune.reports.comparison import Asked, Side, check_alike, comparison, differences, side_by_side
from jaxtune.reports.comparison_page import interval, is_told, render_comparison, verdict
from jaxtune.training.predictions import Predictions

QUESTIONS = 60
BASE = {"model": {"path": "m"}, "data": {"train": "t.jsonl", "completion": "{a}"}, "train": {"steps": 3}}


def config(**sections):
    return Config.model_validate({**BASE, **sections})


def predicted(right, *, shift=0.0, task=True):
    """Answers of which a share is right, to questions of which a fifth has no value, three to a document."""
    rng = np.random.default_rng(0)
    references = ["n/a" if number % 5 == 0 else f"v{number}" for number in range(QUESTIONS)]
    chosen = rng.permutation(QUESTIONS) < right * QUESTIONS
    answers = [reference if good else "<b>no</b>" for reference, good in zip(references, chosen, strict=True)]
    attributes = ["colour" if number % 2 else "size" for number in range(QUESTIONS)]
    documents = [number // 3 for number in range(QUESTIONS)]
    scored = extraction_metrics(answers, references, attributes, clusters=documents)
    tokens = rng.integers(1, 5, QUESTIONS).astype(float)
    losses = tokens * (1.0 + rng.normal(0, 0.1, QUESTIONS) + shift)
    records = [
        {
            "index": number,
            "document": documents[number],
            "attribute": attributes[number],
            "prompt": f"page {number} </pre><script>alert(1)</script>",
            "prediction": answers[number],
            "reference": references[number],
            "correct": bool(scored.correct[number]),
            "found": bool(scored.found[number]),
            "present": bool(scored.present[number]),
        }
        for number in range(QUESTIONS)
    ]
    return Predictions(
        metrics={"loss": float(losses.sum() / tokens.sum()), **(scored.metrics if task else {})},
        standard_errors={"loss": 0.01},
        losses=losses.tolist(),
        tokens=tokens.tolist(),
        documents=documents,
        prompts=[record["prompt"] for record in records],
        completions=references,
        records=records if task else [],
    )


def side(name, predictions, **sections):
    return Side(name, f"{name} at step 3", config(**sections), None, predictions)


def test_differences_are_those_of_the_scores_and_far_ones_are_told():
    first, better = predicted(0.2), predicted(0.9, shift=-0.3)
    found = differences(first, better)
    assert found.keys() == first.metrics.keys()
    for name, value in found.items():
        assert value["difference"] == pytest.approx(better.metrics[name] - first.metrics[name], abs=1e-12)
        assert (value["low"] is None) == (name not in ("loss", "exact_match"))
        if value["low"] is not None:
            assert value["low"] <= value["difference"] <= value["high"]
            assert is_told(value)
            assert not is_told(differences(first, first)[name])
    assert interval(found["f1"], "f1").endswith("points")
    other_tokens = dataclasses.replace(better, tokens=[2 * tokens for tokens in better.tokens])
    assert "loss" not in differences(first, other_tokens)


def test_what_some_got_right_comes_first():
    rows = side_by_side([side("a", predicted(0.2)), side("b", predicted(0.6))])
    assert sorted(row["example"] for row in rows) == list(range(QUESTIONS))
    split = [len(set(row["correct"])) == 2 for row in rows]
    assert split == sorted(split, reverse=True)
    assert sum(split) == sum(row["differs"] for row in rows) > 10
    losses = side_by_side([side(name, predicted(0.2, shift=shift, task=False)) for name, shift in (("a", 0), ("b", 1))])
    assert all(row["losses"][1] - row["losses"][0] == pytest.approx(1.0) for row in losses)


def test_the_page_says_it_in_words_and_escapes_what_it_shows():
    rate, wide = {"learning_rate": 1e-3}, {"learning_rate": 3e-3}
    sides = [side("a", predicted(0.2), optimizer=rate), side("b<i>", predicted(0.9), optimizer=wide)]
    sides.append(side("c", predicted(0.2), optimizer=rate))
    result = comparison(sides, "test")
    assert result["keys"] == {"optimizer.learning_rate": [1e-3, 3e-3, 1e-3]}
    assert (result["examples"], result["documents"]) == (QUESTIONS, QUESTIONS // 3)
    assert verdict(result) == "Exact match of b<i> is better than that of a; exact match does not tell c from a."
    page = render_comparison(result, sides, limit=25)
    assert page.count('<article class="example">') == 25
    assert "b&lt;i&gt;" in page
    assert "<script" not in page
    assert "<b>no" not in page
    alone = comparison([side(name, predicted(0.2, task=False)) for name in "ab"], "test")
    assert "Loss per token" in render_comparison(alone, [sides[0], sides[0]], limit=5)


@pytest.mark.parametrize(
    ("other", "rows", "message"),
    [
        ({"evaluation": {"task": "extraction"}}, "abc", "evaluation.task: one has 'none' and two 'extraction'"),
        ({}, "abd", "data.test: one has 3 examples and two 3, and the first that differs is number 2"),
        ({}, "ab", "data.test: one has 3 examples and two 2, and one is the beginning of the other"),
    ],
)
def test_what_was_asked_other_questions_is_refused(other, rows, message):
    first = Asked("one", config(), "abc")
    check_alike([first, Asked("same", config(optimizer={"learning_rate": 1.0}), "abc")], "test")
    with pytest.raises(UserError, match=message):
        check_alike([first, Asked("two", config(**other), rows)], "test")


def test_other_limits_are_other_questions():
    task = [config(evaluation={"task": "extraction", "limit": limit}) for limit in (None, 4)]
    with pytest.raises(UserError, match=r"evaluation.limit: one has None and two 4.*evaluation.limit=…"):
        check_alike([Asked("one", task[0], "abc"), Asked("two", task[1], "abc")], "test")
