"""Scores against training documents: means with their errors, the ceiling, where it is reached, what a doubling buys.

Two things make a score at a size uncertain: which documents were drawn (and the seed of the training), and which
documents the test split holds. The bootstrap draws both with replacement, seeds and test documents, and fits the curve
again on each draw, so its intervals cover both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from jaxtune.config.metrics import Direction, Goal
from jaxtune.evaluation.statistics import indices
from jaxtune.experiments.power_law import PowerLaw, fit_power_law

_BLOCK = 256

FEWEST_EXAMPLES = 30
"""Test examples below which a group is shown, but not compared with others: one answer would be 3 points."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The scores of all sizes and seeds on one test split, by test example.

    A score is a ratio of sums, or the mean of such ratios over strata, as in :mod:`jaxtune.evaluation.statistics`.

    Attributes:
      sizes: documents, ascending.
      numerators: of each size, seed and test example. The untuned model (size 0) is the same for every seed.
      weights: of each test example, the same for all models; not negative.
      strata: label of each test example whose ratios are averaged.
      clusters: the document of each test example.
      direction: whether the score is minimised or maximised.
      limit: the best score there can be; None where there is no best.
    """

    sizes: tuple[int, ...]
    numerators: Float[np.ndarray, "sizes seeds examples"]
    weights: Float[np.ndarray, " examples"]
    strata: Int[np.ndarray, " examples"]
    clusters: Int[np.ndarray, " examples"]
    direction: Direction
    limit: float | None

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        numerators: Float[np.ndarray, "sizes seeds examples"],
        weights: Sequence[float] | Float[np.ndarray, " examples"],
        *,
        strata: Sequence[Hashable] | None,
        clusters: Sequence[Hashable] | None,
        direction: Direction,
        limit: float | None,
    ) -> Measured:
        """From labels of any kind; one stratum and independent examples where there are none."""
        count = numerators.shape[-1]
        return cls(
            tuple(sizes),
            numerators,
            np.asarray(weights, np.float64),
            np.zeros(count, np.int64) if strata is None else indices(strata),
            np.arange(count) if clusters is None else indices(clusters),
            direction,
            limit,
        )

    @property
    def sign(self) -> float:
        """1 for a loss, -1 for a score that is maximised."""
        return Goal(self.direction).sign

    def only(self, examples: Bool[np.ndarray, " examples"]) -> Measured:
        """The same models on some of the test examples."""
        return dataclasses.replace(
            self,
            numerators=self.numerators[..., examples],
            weights=self.weights[examples],
            strata=indices(self.strata[examples].tolist()),
            clusters=indices(self.clusters[examples].tolist()),
        )

    def scores(self) -> Float[np.ndarray, "sizes seeds"]:
        """The score of each size and seed on the whole test split."""
        return self.numerators @ self._shares()

    def means(self) -> Float[np.ndarray, " sizes"]:
        """The mean score of each size over seeds."""
        return self.scores().mean(axis=1)

    def contributions(self, start: int, end: int, labels: Sequence[str]) -> dict[str, float]:
        """What each label's test examples add to the improvement between two sizes; the sum is the improvement.

        Args:
          start: place of the size before.
          end: place of the size after.
          labels: one for each test example.
        """
        change = self.sign * (self.numerators[start] - self.numerators[end]).mean(axis=0)
        names = dict.fromkeys(labels)
        sums = np.bincount(indices(labels), change * self._shares())
        return {name: float(value) for name, value in zip(names, sums, strict=True)}

    def _shares(self) -> Float[np.ndarray, " examples"]:
        """What a unit of each example's numerator adds to the score: strata without weight are left out of the mean."""
        totals = np.bincount(self.strata, self.weights)
        used = totals > 0
        return (used / np.where(used, totals, 1.0) / max(np.count_nonzero(used), 1))[self.strata]

    def draws(self, samples: int, seed: int = 0) -> Float[np.ndarray, "samples sizes"]:
        """Mean scores of bootstrap draws of seeds and of test documents; NaN where a draw has no weight at all."""
        return np.concatenate(list(self._blocks(samples, np.random.default_rng(seed))))

    def _blocks(self, samples: int, generator: np.random.Generator) -> Iterator[Float[np.ndarray, "block sizes"]]:
        sizes, seeds, _ = self.numerators.shape
        documents, strata = int(self.clusters.max()) + 1, int(self.strata.max()) + 1
        cell = self.clusters * strata + self.strata
        sums = np.zeros((sizes * seeds, documents * strata))
        for row, values in enumerate(self.numerators.reshape(sizes * seeds, -1)):
            sums[row] = np.bincount(cell, values, minlength=documents * strata)
        gained = sums.reshape(sizes * seeds, documents, strata).transpose(1, 0, 2).reshape(documents, -1)
        held = np.bincount(cell, self.weights, minlength=documents * strata).reshape(documents, strata)
        for start in range(0, samples, _BLOCK):
            count = min(_BLOCK, samples - start)
            drawn = generator.multinomial(documents, np.full(documents, 1 / documents), size=count).astype(np.float64)
            repeated = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
            totals = drawn @ held
            gains = np.einsum("bnst,bs->bnt", (drawn @ gained).reshape(count, sizes, seeds, strata), repeated)
            filled = totals > 0
            ratios = np.where(filled[:, None], gains / np.where(filled, totals, 1.0)[:, None], 0.0)
            with np.errstate(invalid="ignore"):
                yield ratios.sum(axis=-1) / filled.sum(axis=-1)[:, None]


def saturation(
    sizes: Sequence[int],
    means: Num[np.ndarray, " n"],
    tolerances: Num[np.ndarray, " n"],
    ceiling: float,
    direction: Direction,
) -> int | None:
    """The smallest size whose mean is no further than its tolerance behind the ceiling; None if there is none."""
    reached = Goal(direction).sign * (np.asarray(means) - ceiling) <= np.asarray(tolerances)
    return int(sizes[int(np.argmax(reached))]) if reached.any() else None


@dataclasses.dataclass(frozen=True)
class Curve:
    """A fitted learning curve with its intervals.

    Attributes:
      sizes: documents, ascending.
      law: the curve through the means of all seeds.
      means: the mean score of each size.
      errors: their standard errors, over seeds and test documents.
      laws: the curves of the bootstrap draws.
      confidence: coverage of the intervals.
    """

    sizes: tuple[int, ...]
    law: PowerLaw
    means: Float[np.ndarray, " sizes"]
    errors: Float[np.ndarray, " sizes"]
    laws: tuple[PowerLaw, ...]
    confidence: float

    def interval(self, values: Sequence[float]) -> tuple[float, float]:
        """The percentile interval of a figure, given it on each draw."""
        ends = [(1 - self.confidence) / 2, (1 + self.confidence) / 2]
        low, high = np.quantile(np.asarray(values), ends, method="closest_observation")
        return float(low), float(high)

    def figure(self, value: float, values: Sequence[float]) -> dict[str, float]:
        """A figure with its interval, for JSON."""
        low, high = self.interval(values)
        return {"value": value, "low": low, "high": high}

    @property
    def ceiling(self) -> dict[str, float]:
        """The score of unlimited data."""
        return self.figure(self.law.ceiling, [law.ceiling for law in self.laws])

    def improvement(self, start: int, end: int) -> dict[str, float]:
        """What the curve says that more documents buy."""
        return self.figure(self.law.improvement(start, end), [law.improvement(start, end) for law in self.laws])

    def band(self, sizes: Sequence[float]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The pointwise interval of the curve at any sizes."""
        values = np.stack([law(sizes) for law in self.laws])
        low, high = np.quantile(values, [(1 - self.confidence) / 2, (1 + self.confidence) / 2], axis=0)
        return low, high


def fit_curve(measured: Measured, *, samples: int, confidence: float, seed: int = 0) -> Curve:
    """The curve of a study and those of its bootstrap draws."""
    means, drawn = measured.means(), measured.draws(samples, seed)
    drawn = drawn[np.isfinite(drawn).all(axis=1)]

    def fit(scores: Float[np.ndarray, " sizes"]) -> PowerLaw:
        return fit_power_law(measured.sizes, scores, direction=measured.direction, limit=measured.limit)

    errors = drawn.std(axis=0, ddof=1)
    return Curve(measured.sizes, fit(means), means, errors, tuple(fit(scores) for scores in drawn), confidence)


def group_curves(
    measured: Measured, groups: Sequence[str], *, samples: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The learning curve of each group's test examples, groups with the most weight first.

    Returns:
      For each group ``examples`` and ``weight`` (test examples and their summed weight), ``ranked`` (whether enough of
      them count to compare it with other groups: :data:`FEWEST_EXAMPLES`), ``scores`` and
      ``standard_errors`` (one for each size), ``ceiling``, ``saturation`` (within one standard error; None if no size
      is) and ``last_gain`` (its part in the improvement between the two largest sizes, in units of the whole score).
    """
    labels = np.asarray(groups)
    gains = measured.contributions(-2, -1, groups)
    weights = {name: float(measured.weights[labels == name].sum()) for name in gains}
    curves = {}
    for name in sorted((name for name in gains if weights[name] > 0), key=lambda name: (-weights[name], name)):
        part = measured.only(labels == name)
        drawn = part.draws(samples, seed)
        means, errors = part.means(), drawn[np.isfinite(drawn).all(axis=1)].std(axis=0, ddof=1)
        law = fit_power_law(part.sizes, means, direction=part.direction, limit=part.limit)
        curves[name] = {
            "examples": int((labels == name).sum()),
            "ranked": int(((labels == name) & (measured.weights > 0)).sum()) >= FEWEST_EXAMPLES,
            "weight": weights[name],
            "scores": means.tolist(),
            "standard_errors": errors.tolist(),
            "ceiling": law.ceiling,
            "saturation": saturation(part.sizes, means, errors, law.ceiling, part.direction),
            "last_gain": gains[name],
        }
    return curves
