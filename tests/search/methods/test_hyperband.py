"""Hyperband's decisions, against successive halving written down anew and against a running Optuna study."""

from __future__ import annotations

import math
import zlib

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.search_section import DimensionConfig
from jaxtune.search.methods import make_method
from jaxtune.search.methods.optuna_study import STUDY_NAME
from jaxtune.search.space import Space

SPACE = Space({"rate": DimensionConfig(log_uniform=(1e-5, 1e-2))})
UNTIL = 90


def hyperband():
    return make_method("hyperband", SPACE, seed=0, initial=3)


@pytest.mark.parametrize(
    ("until", "rungs"), [(90, (10, 30)), (24, (3, 9)), (40, (5, 15)), (9, (1, 3)), (3, (1,)), (2, (1,)), (1, ())]
)
def test_rungs_are_a_ninth_and_a_third(until, rungs):
    assert hyperband().rungs(until) == rungs


def run(scores: dict[int, dict[int, float]]) -> dict[int, int | None]:
    """Trains trials one after another; the step at which each is stopped, None for those that reach the end."""
    method, reports, ends = hyperband(), {}, {}
    for number, curve in scores.items():
        ends[number] = None
        reports[number] = {}
        for step in method.rungs(UNTIL):
            reports[number][step] = curve[step]
            if method.stops(number, UNTIL, reports):
                ends[number] = step
                break
    return ends


curves = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10) | st.just(math.nan)), min_size=1, max_size=20).map(
    lambda pairs: {number: dict(zip((10, 30), pair, strict=True)) for number, pair in enumerate(pairs)}
)


@given(curves)
@settings(max_examples=40, deadline=None)
def test_it_decides_as_a_running_optuna_study(scores):
    """Optuna keeps its notes between two reports; ours are made anew from the reports each time."""
    pruner = optuna.pruners.HyperbandPruner(min_resource=10, max_resource=UNTIL, reduction_factor=3)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name=STUDY_NAME, pruner=pruner)
    ends: dict[int, int | None] = {}

    def objective(trial: optuna.Trial) -> float:
        ends[trial.number] = None
        for step, score in scores[trial.number].items():
            trial.report(score, step)
            if trial.should_prune():
                ends[trial.number] = step
                raise optuna.TrialPruned
        return 1.0

    study.optimize(objective, n_trials=len(scores))
    assert run(scores) == ends


def test_a_bracket_keeps_its_best_third():
    """Trials of one bracket in order of falling worth: at its first rung only the leading third goes on."""
    rng = np.random.default_rng(0)
    scores = {number: {10: score, 30: score} for number, score in enumerate(rng.permutation(60).astype(float))}
    ends = run(scores)
    # Brackets are drawn in proportion to Optuna's allocation: 9, 5 and 3 of 17.
    drawn = {number: zlib.crc32(f"{STUDY_NAME}_{number}".encode()) % 17 for number in scores}
    for rung, members in {
        10: [n for n in scores if drawn[n] < 9],
        30: [n for n in scores if 9 <= drawn[n] < 14],
    }.items():
        seen: list[float] = []
        for number in members:
            seen.append(scores[number][10])
            best = sorted(seen)[max(len(seen) // 3, 1) - 1]
            assert (ends[number] == rung) == (scores[number][10] > best)
    assert all(ends[number] is None for number in scores if drawn[number] >= 14)


def test_a_diverged_trial_is_stopped():
    drawn = zlib.crc32(f"{STUDY_NAME}_0".encode()) % 17
    assert run({0: {10: math.nan, 30: math.nan}}) == {0: 10 if drawn < 9 else 30}


def test_scores_of_other_trials_may_come_in_any_order_and_with_gaps():
    reports = {7: {10: 3.0}, 2: {10: 1.0, 30: 0.5}, 4: {10: 2.0}}
    method = hyperband()
    shuffled = {number: reports[number] for number in (4, 7, 2)}
    assert method.stops(7, UNTIL, reports) == method.stops(7, UNTIL, shuffled)


def test_brackets_do_not_depend_on_how_steps_are_rounded():
    """Whether the worst of twelve trials is stopped at the first rung and at the second is a matter of its bracket."""
    method = hyperband()

    def stopped(until: int) -> list[list[bool]]:
        rungs = method.rungs(until)
        return [
            [
                method.stops(worst, until, {n: dict.fromkeys(rungs[:place], float(n == worst)) for n in range(12)})
                for place in range(1, len(rungs) + 1)
            ]
            for worst in range(12)
        ]

    expected = stopped(18)
    # One bracket that stops at both rungs, one at the second only, one that stops none.
    assert {tuple(one) for one in expected} == {(True, True), (False, True), (False, False)}
    assert all(stopped(until) == expected for until in (4, 16, 20, 28, 45))
    # Of a fraction of three steps with its one rung, the brackets are two.
    assert {tuple(one) for one in stopped(2)} == {tuple(one) for one in stopped(3)} == {(True,), (False,)}
