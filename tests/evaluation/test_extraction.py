from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.evaluation.extraction import extraction_metrics, normalize
from jaxtune.evaluation.statistics import paired_bootstrap

VALUES = st.sampled_from(["n/a", "red", "Blue ", "24 in.", "10", ""])
TRUTHS = st.sampled_from(["n/a", "red", "blue", "24 in.", "10"])
QUESTIONS = st.lists(st.tuples(VALUES, TRUTHS, st.sampled_from(["color", "size", "rating"])), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("  Dark\u00a0 Red\n", "dark red"),
        ("Straße", "STRASSE"),
        ("ﬁne", "FINE"),
        ("ＡＢＣ１", "abc1"),
        ("caf\u0065\u0301", "CAF\u00c9"),
    ],
)
def test_normalize_joins(left, right):
    assert normalize(left) == normalize(right)


@pytest.mark.parametrize(("left", "right"), [("24 in.", "24 in"), ("10", "1 0"), ("red", "read"), ('10"', "10")])
def test_normalize_keeps_apart(left, right):
    assert normalize(left) != normalize(right)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=20))
def test_normalize_is_idempotent(text):
    assert normalize(normalize(text)) == normalize(text)


def test_hand_computed_scores():
    rows = [  # attribute, prediction, reference
        ("color", "Red", "red"),
        ("color", "blue", "green"),
        ("color", "n/a", "black"),
        ("color", "white", "WHITE "),
        ("size", "10", "10"),
        ("size", "12", "n/a"),  # a value where there is none: costs precision only
        ("rating", "N/A", "n/a"),  # absent, said so
        ("rating", "4.5", "4.5"),
        ("rating", "", "3"),  # an empty answer gives no value
        ("smell", "fresh", "n/a"),  # no document has it: outside the averages over attributes
    ]
    attributes, predictions, references = map(list, zip(*rows, strict=True))
    result = extraction_metrics(predictions, references, attributes)
    assert dataclasses.asdict(result.attributes["color"]) == {"found": 2, "answered": 3, "present": 4, "total": 4}
    assert dataclasses.asdict(result.attributes["smell"]) == {"found": 0, "answered": 1, "present": 0, "total": 1}
    expected = {
        "exact_match": (2 / 4 + 1 / 1 + 1 / 2) / 3,
        "precision": 4 / 7,
        "recall": 4 / 7,
        "f1": 4 / 7,
        "precision_macro": (2 / 3 + 1 / 2 + 1) / 3,
        "recall_macro": 2 / 3,
        "f1_macro": (4 / 7 + 2 / 3 + 2 / 3) / 3,
        "accuracy": 5 / 10,
    }
    assert result.metrics == pytest.approx(expected)
    assert result.correct.tolist() == [True, False, False, True, True, False, True, True, False, False]
    assert result.present.sum() == 7
    # Strata color (2 of 4), size (1 of 1), rating (1 of 2): z = (c - p) / (3 n); G counts the 7 present values.
    squares = 4 * (0.5 / 12) ** 2 + 2 * (0.5 / 6) ** 2
    assert result.standard_errors["exact_match"] == pytest.approx(math.sqrt(7 / 6 * squares))


def test_no_value_anywhere_scores_zero_and_says_no_error():
    result = extraction_metrics(["n/a", ""], ["n/a", "N/A"], ["color", "color"])
    assert result.metrics["exact_match"] == 0.0
    assert result.metrics["f1"] == 0.0
    assert result.metrics["accuracy"] == 1.0
    assert result.standard_errors == {}


def test_another_word_for_absent():
    result = extraction_metrics(["none", "n/a"], ["None", "red"], ["color"] * 2, absent="NONE")
    assert result.correct.tolist() == [True, False]
    assert result.attributes["color"].answered == 1


def test_lengths_are_checked():
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        extraction_metrics(["a"], ["a", "b"], ["color", "color"])
    with pytest.raises(ValueError, match="at least one"):
        extraction_metrics([], [], [])


@settings(deadline=None, max_examples=60)
@given(QUESTIONS)
def test_perfect_answers_score_one(questions):
    _, references, attributes = map(list, zip(*questions, strict=True))
    result = extraction_metrics([f" {text.upper()}" for text in references], references, attributes)
    assert result.correct.all()
    if result.present.any():
        assert set(result.metrics.values()) == {1.0}
        assert all(error == 0.0 for error in result.standard_errors.values())


@settings(deadline=None, max_examples=60)
@given(QUESTIONS, st.randoms(use_true_random=False))
def test_order_does_not_matter(questions, random):
    shuffled = random.sample(questions, len(questions))
    one, other = (extraction_metrics(*map(list, zip(*rows, strict=True))) for rows in (questions, shuffled))
    assert one.metrics == pytest.approx(other.metrics)
    assert one.standard_errors == pytest.approx(other.standard_errors)
    assert one.attributes == other.attributes


@settings(deadline=None, max_examples=60)
@given(QUESTIONS)
def test_scores_hang_together(questions):
    result = extraction_metrics(*map(list, zip(*questions, strict=True)))
    assert all(0 <= score <= 1 for score in result.metrics.values())
    for counts in result.attributes.values():
        assert counts.found <= min(counts.answered, counts.present) <= counts.total
        low, high = sorted([counts.precision, counts.recall])
        assert low - 1e-12 <= counts.f1 <= high + 1e-12
    metrics = result.metrics
    low, high = sorted([metrics["precision"], metrics["recall"]])
    assert low - 1e-12 <= metrics["f1"] <= high + 1e-12
    assert metrics["f1_macro"] <= (metrics["precision_macro"] + metrics["recall_macro"]) / 2 + 1e-12
    assert metrics["exact_match"] == metrics["recall_macro"]
    assert not (result.found & ~result.present).any()


def test_two_systems_are_compared_on_the_papers_measure():
    rng = np.random.default_rng(0)
    references = ["red" if present else "n/a" for present in rng.random(400) < 0.8]
    attributes = ["color" if i % 4 else "size" for i in range(400)]
    good, poor = (
        extraction_metrics(["red" if hit else "blue" for hit in rng.random(400) < rate], references, attributes)
        for rate in (0.9, 0.6)
    )
    result = paired_bootstrap(good.found, poor.found, good.present, strata=attributes, samples=500)
    assert result.difference == pytest.approx(good.metrics["exact_match"] - poor.metrics["exact_match"])
    assert 0.1 < result.low < result.difference < result.high < 0.5
