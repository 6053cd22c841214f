"""Rank agreement of early and final scores."""

from __future__ import annotations

import math

import pytest

from jaxtune.search.statistics import rank_agreement, top_k_overlap


def test_all_finished():
    early, final = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 4.0, 5.0]
    agreement = rank_agreement(early, final, top_k=2, failed=[False] * 5)
    # Spearman: 1 - 6 · 2 / (5 · 24); Kendall: 9 concordant and 1 discordant of 10 pairs.
    assert agreement == {
        "spearman": pytest.approx(0.9),
        "kendall": pytest.approx(0.8),
        "top_k": 2,
        "top_k_overlap": 1,
        "finished": 5,
        "basis": "all",
    }


def test_survivors_have_no_overlap():
    agreement = rank_agreement([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, None], top_k=2, failed=[False] * 4)
    assert agreement["spearman"] == pytest.approx(1)
    assert agreement["top_k_overlap"] is None
    assert agreement["basis"] == "survivors"


def test_too_few_or_constant_scores_are_unknown():
    assert rank_agreement([1.0, 2.0], [1.0, 2.0], top_k=1, failed=[False] * 2)["spearman"] is None
    flat = rank_agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], top_k=1, failed=[False] * 3)
    assert flat["spearman"] is None
    assert flat["kendall"] is None


def test_a_diverged_trial_ranks_last_and_needs_no_final_score():
    agreement = rank_agreement(
        [3.0, math.inf, 1.0, 2.0], [3.0, None, 1.0, 2.0], top_k=3, failed=[False, True, False, False]
    )
    assert agreement["top_k_overlap"] == 3
    assert agreement["finished"] == 3
    assert agreement["basis"] == "all"


def test_overlap_of_opposite_orders():
    assert top_k_overlap([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], 2) == 0
    assert top_k_overlap([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0], 2) == 2


def test_trials_that_diverged_are_in_no_leading_group():
    """Of six trials four diverged: the two that are left lead nothing, and are not five of five."""
    lost = [False, False, True, True, True, True]
    agreement = rank_agreement([1.0, 2.0] + [math.inf] * 4, [1.0, 2.0] + [None] * 4, top_k=5, failed=lost)
    assert (agreement["top_k_overlap"], agreement["basis"]) == (None, "all")
    assert top_k_overlap([1.0, 2.0] + [math.inf] * 4, [1.0, 2.0] + [math.inf] * 4, 5) == 2
    # One of the three best early trials diverges later.
    early, final = [1.0, 2.0, 3.0, 4.0, 5.0], [None, 1.0, 2.0, 3.0, 4.0]
    late = rank_agreement(early, final, top_k=3, failed=[True, False, False, False, False])
    assert late["top_k_overlap"] == 2
