"""The replay of recorded curves: what it costs, what it may see, that it repeats, and the committed tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import comparisons
import numpy as np
import pytest
import record_curves
import surrogates
from landscapes import CONFIRMATION_TABLES, DEVELOPMENT_TABLES
from replay import Fractional, Pool, Table, best_of, full, normalised, read_table, winners

from jaxtune.config.search_section import DimensionConfig
from jaxtune.search.space import Space

ROOT = Path(__file__).resolve().parent.parent.parent
SPACE = Space(
    {
        "rate": DimensionConfig(log_uniform=(1e-4, 1e-1)),
        "share": DimensionConfig(uniform=(0.0, 0.3)),
        "rank": DimensionConfig(power_of_two=(4, 64)),
    }
)
STEPS = (5, 10, 20, 40, 70, 100)


@pytest.fixture(scope="module")
def table() -> Table:
    """Curves that fall from 5 to a floor, quadratic in log rate around 3e-3; the highest rates diverge at step 20."""
    points = record_curves.sobol_points(SPACE, 32)
    rates = np.log10([point[0] for point in points])
    floor = 2 + 0.5 * (rates + 2.5) ** 2 + 0.3 * np.array([point[1] for point in points])
    losses = floor[:, None] + (5 - floor)[:, None] * np.exp(-np.array(STEPS) / 15)
    losses[np.ix_(rates > -1.3, np.array(STEPS) >= 20)] = np.nan
    errors = np.where(np.isnan(losses), np.nan, 0.05)
    return Table("made", SPACE, points, normalised(SPACE, points), STEPS, losses, errors, floor + 0.1, np.ones(32))


def test_proposals_become_the_nearest_free_configurations(table):
    pool = Pool(table)
    wanted = table.points[7]
    assert pool.take(wanted) == 7
    distance = np.linalg.norm(table.unit - table.unit[7], axis=1)
    assert pool.take(wanted) == np.argsort(distance)[1]
    assert [len({pool.take(wanted) for _ in range(30)}), len(pool)] == [30, 0]


def test_a_winner_is_sound_and_paid_for(table):
    failed = int(np.flatnonzero(~np.isfinite(table.final))[0])
    assert best_of(table, [failed]) is None
    order = np.argsort(table.final)
    ends = [(1.0, int(order[9])), (2.0, failed), (3.0, int(order[3]))]
    assert winners(table, ends, [0.5, 1, 2, 3, 9]) == {0.5: None, 1: order[9], 2: order[9], 3: order[3], 9: order[3]}


@pytest.mark.parametrize("name", list(surrogates.STRATEGIES))
def test_a_run_repeats_and_more_budget_never_hurts_a_full_one(table, name):
    strategy = surrogates.STRATEGIES[name]
    first = strategy(table, 3, [3, 6])
    assert strategy(table, 3, [3, 6]) == first
    if "fraction" not in name:
        assert table.final[first[6]] <= table.final[first[3]]
    # What a small budget buys does not depend on how far the run goes on.
    assert strategy(table, 3, [3])[3] == first[3]


class Counting(Fractional):
    """Notes what was trained."""

    def _train(self, table, proposer, trial, index, column, reports):
        end = super()._train(table, proposer, trial, index, column, reports)
        trained.append((index, end))
        return end


trained: list[tuple[int, int]] = []


@pytest.mark.parametrize("method", ["random", "hyperband"])
def test_a_study_spends_no_more_than_its_budget(table, method):
    trained.clear()
    budget = 5
    strategy = Counting(method, finishing=0.5)
    strategy(table, 0, [budget])
    promoted = strategy.promote(table, budget)
    assert promoted == 3
    spent = 0.0
    for index, end in trained:
        nan = np.flatnonzero(np.isnan(table.losses[index, : end + 1]))
        spent += STEPS[nan[0] if nan.size else end] / 100
    assert budget - 0.2 - 1e-9 < spent + promoted * 0.8 <= budget + 0.2
    assert len({index for index, _ in trained}) == len(trained)
    if method == "random":
        assert {end for _, end in trained} == {table.column(0.2)}
    else:
        assert {end for _, end in trained} > {table.column(0.2)}, "some are stopped earlier"


def test_learning_beats_chance_on_made_curves(table):
    seeds = range(3)
    learnt = surrogates.regrets(table, Fractional("gp"), seeds, [5])["validation"]
    chance = surrogates.regrets(table, full("random"), seeds, [5])["validation"]
    assert learnt.mean() < 0.5 * chance.mean()
    row = surrogates.described(
        surrogates.regrets(table, full("random"), seeds, [5]), {"validation": learnt, "test": learnt}
    )
    assert row["low"][0] <= row["mean"][0] <= row["high"][0]
    assert row["behind_ours"][0] == pytest.approx(chance.mean() - learnt.mean())
    assert row["test_behind_ours"][0] == pytest.approx(row["test_mean"][0] - learnt.mean())


@pytest.mark.parametrize("task", [*DEVELOPMENT_TABLES, *CONFIRMATION_TABLES])
def test_recorded_tables_hold_whole_curves(task):
    table = read_table(task)
    assert len(table.points) >= 48
    assert table.points == record_curves.sobol_points(table.space, len(table.points))
    finished = np.isfinite(table.final)
    assert finished.sum() > len(finished) / 2
    assert np.isfinite(table.losses[finished]).all()
    assert np.isfinite(table.test[finished]).all()
    # A trial that diverged stays so.
    assert all(not np.diff(np.isnan(row).astype(int)).min() < 0 for row in table.losses)
    assert (table.errors[finished] > 0).all()
    assert table.steps == tuple(round(share * table.steps[-1]) for share in record_curves.SHARES)
    assert not math.isclose(table.final[finished].min(), np.median(table.final[finished]), rel_tol=0.01)


def test_sign_flips_agree_with_all_signs_there_are():
    """Twelve pairs have 4,096 signs: the exact p-value is a count of them."""
    differences = np.random.default_rng(1).normal([0.0, 0.6, -1.5], 1.0, (12, 3))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 12)).reshape(12, -1)
    exact = (np.abs(differences.T @ signs) >= np.abs(differences.sum(0))[:, None] - 1e-9).mean(1)
    assert comparisons.sign_flips(differences) == pytest.approx(exact, abs=0.006)
    assert comparisons.sign_flips(np.zeros((12, 1))) == [1.0]


def test_holm_goes_down_the_ordered_p_values():
    # 0.01 ≤ 0.05/4 and 0.016 ≤ 0.05/3; 0.03 > 0.05/2 ends it, so that 0.04 does not count either.
    assert comparisons.holm([0.03, 0.01, 0.04, 0.016]) == [False, True, False, True]
    assert comparisons.holm([]) == []


def test_the_committed_comparisons_are_those_of_the_committed_regrets():
    result = json.loads((ROOT / "benchmarks/results/surrogates.json").read_text())
    regrets = result["regrets"]
    again = surrogates.compare(result, result["tasks"])
    assert again == result["comparisons"]
    # What the page says beside its tables.
    for task in regrets.values():
        plain, median = (np.array(task[name]["validation"]) for name in ("TPE, full", "TPE, median pruner"))
        assert (plain[:, :2] == median[:, :2]).all()
        assert (plain[:, 2:] != median[:, 2:]).any(axis=0).all()
    stars = [
        (name, left)
        for task in result["tasks"].values()
        for name in surrogates.STRATEGIES
        for left in task["strategies"][name].get("after_holm", [])
        if left
    ]
    assert sum("fraction" not in name for name, _ in stars) == len(stars) - 1


def test_the_committed_figures_are_drawn_from_the_committed_results(tmp_path, monkeypatch, capsys):
    results = str(ROOT / "benchmarks/results/surrogates.json")
    monkeypatch.setattr("sys.argv", ["surrogates.py", "--from", results, "--figures", str(tmp_path)])
    surrogates.main()
    assert "64 trials of 80 steps" in capsys.readouterr().out
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(drawn) == 2
    assert drawn == {name: (ROOT / "docs/figures" / name).read_text() for name in drawn}
