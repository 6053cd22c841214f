"""Search settings on many landscapes: what a budget buys, what is scaled, what is left out, and that a run goes on."""

from __future__ import annotations

import json
import types
from pathlib import Path

import budgeted
import landscape_study
import landscapes
import numpy as np
import pytest
import record_curves
import terminator
from budgeted import ENDINGS, Ending
from landscapes import RecordedTrials, SyntheticTrials, read_mlp, read_study
from replay import Table, normalised

from jaxtune.config.search_section import DimensionConfig
from jaxtune.search.space import Space
from jaxtune.search.surrogate import Surrogate

SPACE = Space({"rate": DimensionConfig(log_uniform=(1e-4, 1e-1)), "rank": DimensionConfig(power_of_two=(4, 64))})
STEPS = (5, 10, 20, 40, 70, 100)


@pytest.fixture(scope="module")
def table() -> Table:
    """Curves whose order never changes; the four highest rates diverge at a tenth of the steps."""
    points = record_curves.sobol_points(SPACE, 64)
    rates = np.log10([point[0] for point in points])
    floor = 2 + (rates + 3) ** 2
    losses = floor[:, None] + np.exp(-np.array(STEPS) / 15)
    losses[np.ix_(np.argsort(rates)[-4:], np.arange(1, 6))] = np.nan
    unit = normalised(SPACE, points)
    return Table("made", SPACE, points, unit, STEPS, losses, np.full(losses.shape, 0.01), floor + 1, np.ones(64))


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.name)
def test_every_ending_spends_the_budget(ending):
    for budget in budgeted.BUDGETS:
        shares = (0.2, *ending.finish)
        steps = sum(count * (shares[at + 1] - shares[at]) for at, count in enumerate(ending.counts(budget)))
        assert ending.early(budget) + steps == pytest.approx(budget)
        # About half is for finishing, and there are enough trials to choose among.
        assert 0.4 * budget <= steps <= 0.5 * budget + 1e-9
        assert ending.early(budget) / 0.2 >= 2 * ending.counts(budget)[0]
    assert Ending((0.4, 1.0), "score").counts(8) == (8, 4)


def test_the_best_of_what_was_paid_for_wins(table):
    """The order at the fraction is that of the end, so the winner is the best of the trials scored."""
    landscape = landscapes.recorded("made", "made", table)
    trials = budgeted.propose(landscape, "random", 0, 8.0)
    spent = np.cumsum([trials.cost(trial, 0.2) for trial in range(len(trials.points))])
    assert spent[-1] == pytest.approx(8.0, abs=0.2)
    diverged = [trial for trial in range(len(trials.points)) if not np.isfinite(trials.final(trial))]
    assert all(trials.cost(trial, 0.2) == 0.1 and trials.observation(trial, 0.2).score is None for trial in diverged)
    assert diverged, "some did"
    surrogate = Surrogate(SPACE, seed=0, initial=6)
    for ending in ENDINGS:
        for budget in (4, 16):
            paid = np.flatnonzero(spent <= ending.early(budget) + 1e-9)
            best = min(paid, key=lambda trial: trials.final(int(trial)))
            assert budgeted.winner(trials, ending, budget, surrogate, {}) == best


def test_a_search_that_ends_early_is_charged_for_what_it_trained(table):
    """The share saved is that of the trials not begun: all finish as many."""
    landscape = landscapes.recorded("made", "made", table)
    trials = budgeted.propose(landscape, "random", 0, 30 * 0.2)
    for count in (12, len(trials.points)):
        cost, regret = terminator.outcome(landscape, trials, 0, count)
        sound = [trial for trial in range(count) if np.isfinite(trials.final(trial))]
        assert cost == pytest.approx(sum(trials.cost(trial, 0.2) for trial in range(count)) + 5 * 0.8)
        best = min(sound, key=trials.final)
        assert regret == trials.regret(best)["validation"]
    # Six scores are too few to end a search, whatever is gained.
    few = budgeted.propose(landscape, "random", 0, 6 * 0.2)
    assert terminator.stop(landscape, few, 0) == len(few.points)


def test_regret_is_0_for_the_best_and_1_for_the_median(table):
    trials = RecordedTrials(table)
    while not trials.exhausted:
        trials.add(SPACE.snap([1e-3, 4]))
    assert len({tuple(point) for point in trials.points}) == 64
    regrets = [trials.regret(trial) for trial in range(64)]
    finite = [one["validation"] for at, one in enumerate(regrets) if np.isfinite(trials.final(at))]
    assert (min(finite), np.median(finite)) == (0, pytest.approx(1))
    assert max(finite) == trials.regret(None)["validation"]
    # The test loss is the validation loss less what all have in common.
    assert all(one["test"] == pytest.approx(one["validation"]) for one in regrets if one["validation"] < max(finite))


class Bowl:
    """What ``synthetic.py`` gives: noise at early shares, divergence at rates above 10**-2.2."""

    def __init__(self, seed: int, bias: float, noise: float):
        self.noise = noise

    def diverges(self, rows):
        return np.atleast_2d(rows)[:, 0] > -2.2

    def tdiv(self, row):
        return 0.05

    def true(self, rows):
        rows = np.atleast_2d(rows)
        return np.where(self.diverges(rows), np.nan, 1 + (rows[:, 0] + 3.5) ** 2)

    def observe(self, rows, share, state):
        return self.true(rows) + self.noise * (1 - share) * state.randn(len(np.atleast_2d(rows)))


def test_the_synthetic_objective_is_taken_as_it_is():
    def points(count, state):
        return np.stack([state.uniform(-5, -2, count), *np.zeros((5, count))], axis=1)

    module = types.ModuleType("made")
    vars(module).update(Task=Bowl, rnd=points, optimum=lambda task: (None, 1.0))
    trials = SyntheticTrials(module, 3, 1.0, 0.1)
    for rate in (10**-3.5, 1e-4, 10**-2.1):
        trials.add(landscapes.SYNTHETIC_SPACE.snap([rate, 4, 1.0, 0.1, 0.01, 0.1]))
    assert trials.regret(0)["validation"] == pytest.approx(0, abs=1e-6)
    sound = np.random.RandomState(0).uniform(-5, -2, 4096)
    median = np.median((sound[sound <= -2.2] + 3.5) ** 2)
    assert trials.regret(1)["validation"] == pytest.approx(0.25 / median, rel=1e-3)
    assert trials.regret(2) == trials.regret(None)
    assert [trials.cost(trial, 0.2) for trial in range(3)] == [0.2, 0.2, 0.05]
    assert trials.observation(2, 0.2).score is None
    assert trials.observation(0, 0.2) == trials.observation(0, 0.2) != trials.observation(0, 0.4)
    assert trials.final(0) == pytest.approx(1.0)


def test_tables_are_read_from_arrays_and_from_a_study(table, tmp_path):
    unit = np.random.default_rng(0).random((7, 6))
    losses = np.arange(42.0).reshape(7, 6)
    np.savez(tmp_path / "mlp_x.npz", unit=unit, losses=losses, errors=losses / 100, test=losses[:, -1])
    read = read_mlp(tmp_path / "mlp_x.npz")
    np.testing.assert_allclose(read.unit, unit, atol=1e-5)
    assert (read.name, read.column(0.4), read.share(3)) == ("mlp_x", 3, 0.4)
    space = {key: {value.kind: [value.decode(value.low), value.decode(value.high)]} for key, value in zip(
        SPACE.keys, SPACE.dimensions, strict=True)}  # fmt: skip
    trials = [
        {
            "configuration": SPACE.configuration(point),
            "steps": [20, 100],
            "scores": {"0.2": 3.0 + at, "1": None if at == 2 else 2.0 + at},
            "standard_error": 0.1,
        }
        for at, point in enumerate(table.points[:4])
    ]
    trials[0]["configuration"]["rate"] = 1.0  # a reference outside the space
    summary = {"study": "early-score", "objective": {"name": "loss"}, "fractions": [0.2, 1.0], "trials": trials}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "trials.jsonl").write_text(json.dumps({"event": "study", "space": space}) + "\n")
    study = read_study(tmp_path)
    assert study.points == table.points[1:4]
    np.testing.assert_array_equal(study.losses, [[4, 3], [5, np.nan], [6, 5]])
    assert list(RecordedTrials(study).regret(None)) == ["validation"]
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "objective": {"name": "f1"}}))
    with pytest.raises(SystemExit, match="by loss"):
        read_study(tmp_path)


def test_a_run_goes_on_behind_its_last_cell_and_only_whole_instances_count(table, tmp_path, monkeypatch):
    made = landscapes.recorded("made", "made", table)
    measured = []

    def cell(landscape, proposer, seed):
        measured.append((proposer, seed))
        worse = {"gp, thompson": 0.1}.get(proposer, 0.4) + 0.01 * seed
        return {ending.name: {"validation": [worse] * 3} for ending in ENDINGS}

    monkeypatch.setattr(landscape_study, "cell", cell)
    file = tmp_path / "cells"
    assert landscape_study.measure([made], 4, 0, file, part=(0, 2), minutes=1)
    assert len(measured) == 10
    with pytest.raises(SystemExit, match="no instance"):
        landscape_study.gathered({})
    assert not landscape_study.measure([made], 4, 0, file, part=(1, 2), minutes=-1)
    assert landscape_study.measure([made], 4, 0, file, part=(1, 2), minutes=1)
    assert landscape_study.measure([made], 4, 0, file, part=(0, 1), minutes=1)
    assert len(measured) == 20 == len(set(measured))
    result = landscape_study.gathered(landscape_study.read_cells(file))
    ours = "gp, thompson: rungs 0.4, 1, by score"
    row = landscape_study.summarised(result)["validation"]["strategies"][ours]
    assert row["mean"] == pytest.approx([0.115] * 3)
    assert row["against_old"] == row["against_old_low"] == pytest.approx([-0.3] * 3), "pairs differ by the same"
    verdict = landscape_study.judged(result, ours)["rivals"]
    # Four pairs of one sign: of 16 signs two are as far from zero, and nine such tests leave nothing.
    assert verdict["random: straight, by score"]["p"] == pytest.approx([1 / 8] * 3, abs=0.01)
    assert not any(any(one["told_apart"]) for one in verdict.values())


def test_confirmation_names_the_commit_it_judges():
    with pytest.raises(SystemExit, match="no commit of this tree"):
        landscape_study.require_commit("0" * 40)


def test_what_confirms_is_not_what_was_chosen_on():
    assert not set(landscapes.DEVELOPMENT_TABLES) & set(landscapes.CONFIRMATION_TABLES)
    nowhere = Path("nowhere")
    assert {one.name for one in landscapes.development(nowhere)} == set(landscapes.DEVELOPMENT_TABLES)
    assert {one.name for one in landscapes.confirmation(nowhere, [])} <= set(landscapes.CONFIRMATION_TABLES)
