"""Finalists trained again with other seeds: the best mean wins, and a study that was killed repeats nothing twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from synthetic import REFERENCE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.reports.headline import finalists, find_winner, seeds_sentence
from jaxtune.reports.progress import steps_left
from jaxtune.reports.records import read_study
from jaxtune.search import Outcome, Study, StudySummary
from jaxtune.search.details import trial_details
from jaxtune.search.repeats import FINALISTS
from jaxtune.search.statistics import t_interval
from jaxtune.search.status import read_status
from tests.told_types import check_types

SEED = "train.seed"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is put on the disk for good, nothing is fitted, and no summary explains anything."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("jaxtune.search.surrogate.Surrogate.fit", lambda self, observations: None)


class Lucky(SyntheticRunner):
    """What is best at first is worst with every other seed.

    Args:
      diverges: a trial that diverges with its last seed.
    """

    def __init__(self, capacity: int = 1, diverges: int | None = None):
        super().__init__(capacity=capacity, noise=0.0)
        self.diverges = diverges
        self.seeds: list[tuple[int, int]] = []

    def run(self, trial, until):
        assert len({one.id for one, _ in self.started}) == len(self.started)
        outcome = super().run(trial, until)
        seed = trial.configuration.get(SEED, 7)
        if until == self.steps:
            self.seeds.append((trial.id, seed))
        if seed == 7:
            return outcome
        # A better score becomes a worse one.
        score = 2.0 - outcome.score + 0.001 * seed
        failed = (trial.id, seed) == (self.diverges, 9)
        return Outcome(float("nan") if failed else score, None, until, 0.5, {}, diverged=failed)


def study(run_dir, runner=None, **changes) -> Study:
    search = search_config(**{"method": "random", "trials": 6, "seeds": 3, **changes})
    base = {"name": "test", "train": {"seed": 7}}
    return Study(run_dir, search, runner or Lucky(), reference=REFERENCE, base=base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir, runner = tmp_path_factory.mktemp("repeats") / "whole", Lucky()
    summary = study(run_dir, runner).run()
    assert summary is not None
    return run_dir, runner, summary


def test_the_best_mean_wins(whole):
    run_dir, runner, summary = whole
    final = {trial["id"]: trial["final_score"] for trial in summary["trials"] if trial["final_score"] is not None}
    best = sorted(final, key=final.__getitem__)[:FINALISTS]
    again = [(number, seed) for number, seed in runner.seeds if seed != 7]
    assert again == [(number, seed) for seed in (8, 9) for number in best]
    told = {(one["trial"], one["seed"]): one for one in records(run_dir) if one["event"] == "repeated"}
    assert sorted(told) == sorted(again)
    assert all(one["configuration"] == summary["trials"][number]["configuration"] for (number, _), one in told.items())
    check_types(StudySummary, summary)
    assert summary == json.loads((run_dir / "summary.json").read_text())
    repeats = summary.seeds
    assert repeats is not None
    assert (repeats["count"], repeats["confidence"]) == (3, 0.95)
    means = {}
    for row in repeats["trials"]:
        number = row["trial"]
        assert row["scores"] == [final[number], told[number, 8]["score"], told[number, 9]["score"]]
        error = stats.sem(row["scores"])
        low, high = stats.t.interval(0.95, 2, loc=np.mean(row["scores"]), scale=error)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((np.mean(row["scores"]), low, high))
        means[number] = row["mean"]
    assert list(means) == sorted(means, key=means.__getitem__)
    assert summary["best"]["trial"] == min(means, key=means.__getitem__) != best[0]
    assert summary["budget"]["steps_run"] == 10 * 6 + 40 * len(final) + 6 * 50 == read_status(run_dir).steps
    assert summary["budget"]["seconds"] == pytest.approx(0.5 * (6 + len(final) + 6))
    record = read_study(run_dir)
    winner = find_winner(record)
    assert winner is not None
    assert winner.trial.id == summary["best"]["trial"] == read_status(run_dir).best
    assert "The best mean wins" in seeds_sentence(record)
    columns, rows = finalists(record, winner)
    assert columns == ["Finalist", "Mean", "Interval", "Seed 1", "Seed 2", "Seed 3"]
    for row, one in zip(rows, repeats["trials"], strict=True):
        interval = f"{one['low']:.4f} to {one['high']:.4f}".replace("-", "−")
        assert row[1:] == [f"{one['mean']:.4f}", interval, *(f"{score:.4f}" for score in one["scores"])]
    assert rows[0][0] == f"Trial {winner.trial.id} (winner)"
    details = trial_details(run_dir, winner.trial.id)
    assert {seed: outcome["score"] for seed, outcome in details["repeats"].items()} == {
        str(seed): told[winner.trial.id, seed]["score"] for seed in (8, 9)
    }
    assert steps_left(record, 50) == 0


@pytest.mark.parametrize("capacity", [1, 4])
def test_a_killed_study_repeats_nothing_twice(whole, tmp_path, capacity):
    first = Lucky(capacity)
    third = next(one for one, seed in whole[1].seeds if seed == 8)
    interrupt, started = interrupt_at(third, 50), []

    def before(trial, until):
        started.append(trial.configuration.get(SEED))
        if trial.configuration.get(SEED) == 9:
            interrupt(trial, until)

    first.before = before
    assert study(tmp_path, first).run() is None
    second = Lucky(capacity)
    summary = study(tmp_path, second).run()
    assert summary is not None
    assert (summary.seeds, summary["best"]) == (whole[2].seeds, whole[2]["best"])
    assert {seed for _, seed in second.seeds} == {9}
    again, told = ([one for one in records(place) if one["event"] == "repeated"] for place in (tmp_path, whole[0]))
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, told))


def test_one_that_diverges_with_a_seed_does_not_win(whole, tmp_path):
    best = whole[2]["best"]["trial"]
    summary = study(tmp_path, Lucky(diverges=best)).run()
    assert summary is not None
    assert summary.seeds is not None
    *sound, last = summary.seeds["trials"]
    assert (last["trial"], last["mean"], last["scores"][2]) == (best, None, None)
    assert summary["best"]["trial"] == sound[0]["trial"]
    record = read_study(tmp_path)
    assert finalists(record, find_winner(record))[1][-1][:3] == [f"Trial {best}", "–", "–"]
    assert finalists(record, find_winner(record))[1][-1][-1] == "diverged"


def test_a_searched_seed_and_repetitions_are_refused():
    space = {SEED: {"integer": (0, 9)}, "optimizer.learning_rate": {"log_uniform": (1e-5, 1e-2)}}
    with pytest.raises(ValueError, match=r"train\.seed, which space searches"):
        search_config(space=space, seeds=2)


def test_an_interval_takes_two_values():
    assert t_interval([], 0.95) == (None, None, None)
    assert t_interval([1.5], 0.95) == (1.5, None, None)
