"""Attribute extraction: which of the values on a page were found.

A question is one attribute of one document; its answer is a value, or "n/a" where the document does not give one. An
answer counts as right when it equals the ground truth after :func:`normalize`.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool

from jaxtune.evaluation.statistics import ratio


def normalize(text: str) -> str:
    """What is compared: Unicode compatibility caseless form, runs of whitespace as one space, ends stripped.

    NFKC makes full-width letters, ligatures and no-break spaces plain; case folding makes "Straße" equal "STRASSE".
    Punctuation is kept, at the ends too: in ``24 in.``, ``10"`` and ``(Pack of 2)`` it is part of the value, values are
    verbatim spans of the page, and a tuned model does learn not to end its answer with a full stop.
    """
    # Folding can undo the normal form, and the normal form can bring back cased letters: hence twice (Unicode, D146).
    for _ in range(2):
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class Counts:
    """What happened on one attribute, or on all.

    Attributes:
      found: answers that equal the ground truth, which is a value.
      answered: answers that give a value (not "n/a", not empty), right or wrong.
      present: ground truths that are a value.
      total: questions.
    """

    found: int
    answered: int
    present: int
    total: int

    @property
    def precision(self) -> float:
        """Share of the given values that are right; 0 where none was given."""
        return self.found / self.answered if self.answered else 0.0

    @property
    def recall(self) -> float:
        """Share of the ground-truth values that were found; 0 where there are none."""
        return self.found / self.present if self.present else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where there is no value on either side."""
        return 2 * self.found / (self.answered + self.present) if self.answered + self.present else 0.0


@dataclasses.dataclass(frozen=True)
class ExtractionResult:
    """Scores of one set of answers; see :func:`extraction_metrics` for the definitions.

    Attributes:
      metrics: name -> score in [0, 1].
      standard_errors: name -> standard error, for ``exact_match`` and ``f1``; absent where it cannot be estimated.
      attributes: attribute -> counts.
      correct: per question, the answer is right (a right "n/a" included).
      found: per question, a ground-truth value was found.
      present: per question, the ground truth is a value. ``paired_bootstrap(a.found, b.found, a.present, strata=...)``
        compares two systems on the paper's measure.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    attributes: dict[str, Counts]
    correct: Bool[np.ndarray, " n"]
    found: Bool[np.ndarray, " n"]
    present: Bool[np.ndarray, " n"]


def extraction_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    attributes: Sequence[str],
    absent: str = "n/a",
    *,
    clusters: Sequence[Hashable] | None = None,
) -> ExtractionResult:
    """Scores answers to attribute questions.

    ``exact_match`` is the measure of arXiv:2407.13906: the share of an attribute's ground-truth values that were found
    exactly, averaged over the attributes with equal weight. Questions whose ground truth is absent do not enter it
    (there is no value to find), nor do attributes that no document has. Such questions do enter the precision: a value
    given where there is none is a wrong one. An empty answer gives no value, like "n/a".

    - ``precision``, ``recall``, ``f1``: over the pooled questions (micro), as is usual in extraction.
    - ``precision_macro``, ``recall_macro``, ``f1_macro``: per attribute, then averaged over the same attributes as
      ``exact_match``, which ``recall_macro`` equals. An attribute for which no value was given has precision 0.
    - ``accuracy``: share of all questions answered right, a right "n/a" included.

    Args:
      predictions: answers, as text.
      references: ground truths.
      attributes: the attribute asked for; all three have one entry per question.
      absent: the answer that means "the document does not give it"; compared after normalising.
      clusters: label per question of what is independent (the document); the question itself if None. Only the standard
        errors depend on it.

    Raises:
      ValueError: lengths differ, or there is nothing to score.
    """
    if not len(predictions) == len(references) == len(attributes) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references and {len(attributes)} attributes; "
            "give one of each per question, and at least one"
        )
    nothing = ("", normalize(absent))
    answers = ["" if normalize(text) in nothing else normalize(text) for text in predictions]
    truths = ["" if normalize(text) in nothing else normalize(text) for text in references]
    correct = np.array([answer == truth for answer, truth in zip(answers, truths, strict=True)])
    answered = np.array([bool(answer) for answer in answers])
    present = np.array([bool(truth) for truth in truths])
    found = correct & present

    names = np.array(attributes, dtype=object)

    def count(chosen: Bool[np.ndarray, " n"]) -> Counts:
        return Counts(
            found=int(found[chosen].sum()),
            answered=int(answered[chosen].sum()),
            present=int(present[chosen].sum()),
            total=int(chosen.sum()),
        )

    per_attribute = {name: count(names == name) for name in dict.fromkeys(attributes)}
    pooled = count(np.ones(len(names), dtype=bool))
    averaged = [counts for counts in per_attribute.values() if counts.present]

    def macro(score: str) -> float:
        return float(np.mean([getattr(counts, score) for counts in averaged])) if averaged else 0.0

    metrics = {
        "exact_match": macro("recall"),
        **{score: getattr(pooled, score) for score in ("precision", "recall", "f1")},
        **{f"{score}_macro": macro(score) for score in ("precision", "recall", "f1")},
        "accuracy": float(correct.mean()),
    }
    errors = {
        "exact_match": ratio(found, present, strata=attributes, clusters=clusters)[1],
        "f1": ratio(2 * found, answered.astype(np.int64) + present, clusters=clusters)[1],
    }
    known = {name: error for name, error in errors.items() if error is not None}
    return ExtractionResult(metrics, known, per_attribute, correct, found, present)
