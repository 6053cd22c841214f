"""Acquisition functions against scikit-optimize and their closed form; what a study that has begun goes on with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import norm
from synthetic import REFERENCE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.errors import UserError
from jaxtune.search import Study
from jaxtune.search.acquisition import expected_improvement, thompson
from jaxtune.search.header import amended_header

MEAN = np.array([0.5, -0.2, 0.0, 3.0, -1.0])
DEVIATION = np.array([0.1, 0.3, 0.0, 2.0, 0.0])


def test_expected_improvement_is_that_of_scikit_optimize():
    from skopt.acquisition import gaussian_ei

    class Told:
        def predict(self, columns, return_std):
            return MEAN, DEVIATION

    worth = expected_improvement(MEAN, DEVIATION, 0.1, np.random.default_rng(0))
    np.testing.assert_array_equal(worth, gaussian_ei(np.zeros((5, 1)), Told(), 0.1))


def test_a_thompson_draw_has_the_posterior_s_moments_and_wins_as_often_as_it_is_best():
    draws = -np.array([thompson(MEAN, DEVIATION, 0.0, np.random.default_rng(seed)) for seed in range(4_000)])
    np.testing.assert_allclose(draws.mean(0), MEAN, atol=0.1)
    np.testing.assert_allclose(draws.std(0), DEVIATION, atol=0.05)
    two = (
        thompson(MEAN, DEVIATION, 0.0, np.random.default_rng(7)),
        thompson(MEAN, DEVIATION, 5.0, np.random.default_rng(7)),
    )
    np.testing.assert_array_equal(*two)
    # Of two independent candidates the first is the lower one with P(N(0, sqrt(2)) < -0.5).
    first = [
        thompson(np.array([0.0, 0.5]), np.ones(2), 0.0, np.random.default_rng(seed)).argmax() == 0
        for seed in range(4_000)
    ]
    assert np.mean(first) == pytest.approx(norm.cdf(0.5 / np.sqrt(2)), abs=0.025)


def study(run_dir, acquisition, runner=None) -> Study:
    search = search_config(acquisition=acquisition, trials=7, promote=2)
    return Study(run_dir, search, runner or SyntheticRunner(), reference=REFERENCE, base={"name": "test"})


def test_a_stopped_study_of_draws_goes_on_to_the_same_end(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    study(whole, "thompson").run()
    runner = SyntheticRunner()
    runner.before = interrupt_at(5, 10)
    assert study(parts, "thompson", runner).run() is None
    assert study(parts, "thompson").run() is not None
    assert records(parts) == records(whole)
    other = tmp_path / "other"
    study(other, "ei").run()
    proposed = [
        [one["configuration"] for one in records(path) if one["event"] == "proposed"] for path in (whole, other)
    ]
    assert proposed[0][:4] == proposed[1][:4], "the design is the same"
    assert proposed[0][4:] != proposed[1][4:]


def test_a_study_from_before_there_was_a_choice_goes_on_by_expected_improvement(tmp_path):
    whole, old = tmp_path / "whole", tmp_path / "old"
    study(whole, "ei").run()
    runner = SyntheticRunner()
    runner.before = interrupt_at(5, 10)
    assert study(old, "ei", runner).run() is None
    path = old / "trials.jsonl"
    first, *rest = path.read_text().splitlines()
    header = json.loads(first)
    assert header.pop("acquisition") == "ei"
    path.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    assert amended_header([header], path)["acquisition"] == "ei"
    with pytest.raises(UserError, match=r"another study: search\.acquisition"):
        study(old, "thompson").run()
    assert study(old, None).run() is not None
    assert records(old)[1:] == records(whole)[1:]


def test_unset_means_what_the_study_began_with(tmp_path):
    runner = SyntheticRunner()
    runner.before = interrupt_at(1, 10)
    assert study(tmp_path, "thompson", runner).run() is None
    assert study(tmp_path, None).search.acquisition == "thompson"
    assert study(tmp_path / "new", None).search.acquisition == "thompson"
