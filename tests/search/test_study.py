"""A study from its first trial to its summary, over a runner that trains nothing."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter

import numpy as np
import pytest
from synthetic import REFERENCE, SPACE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.config.schema import Config
from jaxtune.errors import UserError
from jaxtune.search import Outcome, Study, StudySummary
from jaxtune.search.journal import Journal
from jaxtune.search.milestones import Milestones, milestones
from jaxtune.search.surrogate import Surrogate
from tests.told_types import check_types


def study(run_dir, runner=None, *, reference=REFERENCE, base=None, search=None, **arguments) -> Study:
    base = {"name": "test", "model": {"path": "none"}} if base is None else base
    search = search_config() if search is None else search
    return Study(run_dir, search, runner or SyntheticRunner(), reference=reference, base=base, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished study: its directory, its runner, its summary and its events."""
    run_dir, runner, events = tmp_path_factory.mktemp("study"), SyntheticRunner(), []
    summary = study(run_dir, runner, on_event=lambda *event: events.append(event)).run()
    return run_dir, runner, summary, events


def test_the_summary_is_of_the_types_that_are_told(finished):
    run_dir, _, summary, _ = finished
    check_types(StudySummary, summary)
    assert summary.best["trial"] == summary["best"]["trial"]
    for page in (summary._repr_html_(), study(run_dir)._repr_html_()):
        head, *rows = re.findall(r"<tr>(.*?)</tr>", page)
        assert re.findall(r"<th>(.*?)</th>", head)[:4] == ["trial", "status", "early_score", "final_score"]
        cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
        assert [row[:2] for row in cells] == [[str(trial["id"]), trial["status"]] for trial in summary.trials]
        for row, trial in zip(cells, summary.trials, strict=True):
            early = trial["early_score"]
            assert row[2] == "–" if early is None else float(row[2]) == pytest.approx(early, rel=1e-3)


def test_the_summary_holds_the_contract(finished):
    run_dir, _, summary, _ = finished
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert summary["objective"] == {"name": "loss", "direction": "min"}
    assert summary["fraction"] == 0.2
    assert [trial["id"] for trial in summary["trials"]] == list(range(8))
    by_status = Counter(trial["status"] for trial in summary["trials"])
    assert by_status["finished"] == 4, "the reference and three promoted ones"
    final = {trial["id"]: trial["final_score"] for trial in summary["trials"] if trial["final_score"] is not None}
    best = summary["best"]
    assert best["trial"] == min(final, key=lambda number: final[number])
    assert best["configuration"] == summary["trials"][best["trial"]]["configuration"]
    assert best["final_score"] == final[best["trial"]]
    assert summary["baseline"]["configuration"] == REFERENCE
    assert summary["baseline"]["final_score"] == final[0]
    assert summary["baseline"]["in_space"] is True
    assert best["test_score"] < summary["baseline"]["test_score"] < summary["untuned"]["test_score"]
    agreement = summary["rank_agreement"]
    assert agreement["basis"] == "survivors"
    assert agreement["top_k_overlap"] is None
    assert -1 <= agreement["kendall"] <= 1
    assert summary["budget"] == {
        "steps_run": 4 * 10 + 4 * 50,
        "steps_if_all_finished": 8 * 50,
        "compilations": 2,  # schedules
        "seconds": pytest.approx(12 * 0.5),
    }
    assert [curve["key"] for curve in summary["partial_dependence"]] == list(SPACE)
    assert set(summary["importance"]) == set(SPACE)
    # All test examples shift alike, so the paired interval is a point although single scores vary by 0.2.
    difference = summary["test_difference"]
    assert difference["difference"] == pytest.approx(best["test_score"] - summary["baseline"]["test_score"])
    assert difference["high"] - difference["low"] < 1e-9
    assert difference["examples"] == 60


def test_each_model_is_tested_once(finished):
    _, runner, summary, _ = finished
    assert runner.tests == [None, 0, summary["best"]["trial"]]


def test_what_a_proposal_knows_is_in_the_journal(finished):
    run_dir, _, _, _ = finished
    proposed = [record for record in records(run_dir) if record["event"] == "proposed"]
    assert [record["source"] for record in proposed] == ["reference", *["design"] * 3, *["surrogate"] * 4]
    for record in proposed[4:]:
        assert record["told"] == list(range(record["trial"] - 1))
        assert record["pending"] == [record["trial"] - 1]
    assert len({json.dumps(record["configuration"], sort_keys=True) for record in proposed}) == 8


def test_events_tell_what_the_journal_tells(finished):
    run_dir, _, _, events = finished
    assert [name for name, _, _ in events if name not in ("started", "summary")] == [
        record["event"] for record in records(run_dir)
    ]
    started = [(trial, details["step"]) for name, trial, details in events if name == "started"]
    assert started[:8] == [(trial, 10) for trial in range(8)]
    assert events[-1][0] == "summary"


def test_a_finished_study_runs_nothing_again(finished):
    run_dir, _, summary, _ = finished
    before = (run_dir / "trials.jsonl").read_bytes()
    runner = SyntheticRunner()
    assert study(run_dir, runner).run() == summary
    assert (runner.calls, runner.tests) == ([], [])
    assert (run_dir / "trials.jsonl").read_bytes() == before


@pytest.mark.parametrize("at", [(3, 10), (6, 10), (0, 50)])
def test_a_stopped_study_goes_on_to_the_same_end(finished, tmp_path, at):
    runner = SyntheticRunner()
    runner.before = interrupt_at(*at)
    assert study(tmp_path, runner).run() is None
    assert runner.calls[-1] == at
    assert study(tmp_path).run() == finished[2]
    assert records(tmp_path) == records(finished[0])


def test_the_stop_callable_is_asked_between_trials(finished, tmp_path):
    runner, answers = SyntheticRunner(), iter([False, False, True])
    assert study(tmp_path, runner, should_stop=lambda: next(answers)).run() is None
    assert runner.calls == [(0, 10), (1, 10)]
    assert study(tmp_path).run() == finished[2]


def test_a_failing_runner_leaves_a_study_that_goes_on(finished, tmp_path):
    runner = SyntheticRunner()

    def fail(trial, until):
        if trial.id == 5:
            raise OSError("the data source is gone")

    runner.before = fail
    with pytest.raises(OSError, match="data source"):
        study(tmp_path, runner).run()
    study(tmp_path).run()
    assert records(tmp_path) == records(finished[0])


def test_the_surrogate_works_while_a_trial_trains(tmp_path, monkeypatch):
    proposed = {number: threading.Event() for number in range(1, 6)}
    propose = Surrogate.propose

    def recorded(self, trial, told, pending):
        proposal = propose(self, trial, told, pending)
        proposed[trial].set()
        return proposal

    def wait(trial, until):
        """Training does not end before the next proposal is there."""
        if until == 10 and trial.id < 5:
            assert proposed[trial.id + 1].wait(timeout=60), "nobody proposes while the trial trains"

    monkeypatch.setattr(Surrogate, "propose", recorded)
    runner = SyntheticRunner()
    runner.before = wait
    assert study(tmp_path, runner, search=search_config(trials=6, promote=1)).run() is not None


def test_diverged_trials_are_failed_and_never_promoted(tmp_path):
    runner = SyntheticRunner(divergence=3e-4)
    summary = study(tmp_path, runner).run()
    assert summary is not None
    failed = {trial["id"] for trial in summary["trials"] if trial["status"] == "failed"}
    assert failed
    assert failed.isdisjoint(trial for trial, until in runner.calls if until == 50)
    assert all(summary["trials"][trial]["early_score"] is None for trial in failed)
    assert "NaN" not in (tmp_path / "trials.jsonl").read_text()
    failures = [record for record in records(tmp_path) if record["event"] == "failed"]
    assert {record["trial"] for record in failures} == failed
    assert all(record["diverged"] and record["score"] is None for record in failures)
    # The surrogate was told of them: later proposals keep away from rates that diverged.
    assert study(tmp_path).run() == summary


def test_an_infinite_score_is_a_divergence_whatever_the_runner_says(tmp_path):
    class Infinite(SyntheticRunner):
        def run(self, trial, until):
            outcome = super().run(trial, until)
            return outcome if trial.id != 2 else Outcome(math.inf, None, until, 0.0)

    summary = study(tmp_path, Infinite()).run()
    assert summary is not None
    assert summary["trials"][2]["status"] == "failed"


def test_one_that_diverges_after_its_promotion_is_replaced(finished, tmp_path):
    first = next(record["trial"] for record in records(finished[0]) if record["event"] == "promoted")

    class Late(SyntheticRunner):
        def run(self, trial, until):
            outcome = super().run(trial, until)
            return Outcome(math.nan, None, 30, 0.1, diverged=True) if (trial.id, until) == (first, 50) else outcome

    summary = study(tmp_path, Late()).run()
    assert summary is not None
    assert summary["trials"][first]["status"] == "failed"
    assert summary["trials"][first]["early_score"] is not None
    finished_now = [trial["id"] for trial in summary["trials"] if trial["status"] == "finished"]
    assert len(finished_now) == 4
    assert summary["best"]["trial"] != first


def test_all_diverged_is_said_and_kept(tmp_path):
    with pytest.raises(UserError, match=r"all 8 trials diverged.*search\.space\.optimizer\.learning_rate"):
        study(tmp_path, SyntheticRunner(divergence=0.0)).run()
    assert len([record for record in records(tmp_path) if record["event"] == "failed"]) == 8


def test_a_diverged_reference_leaves_the_search_going(tmp_path):
    reference = {**REFERENCE, "optimizer.learning_rate": 9e-3}
    summary = study(tmp_path, reference=reference).run()
    assert summary is not None
    assert summary["baseline"]["final_score"] is None
    assert summary["baseline"]["test_score"] is None
    assert summary["test_difference"] is None
    assert summary["best"]["trial"] > 0


def test_an_objective_that_is_maximised(tmp_path, finished):
    search = search_config(objective="exact_match")
    summary = study(tmp_path, SyntheticRunner(sign=-1.0), search=search, direction="max").run()
    assert summary is not None
    mirrored = finished[2]
    assert summary["objective"] == {"name": "exact_match", "direction": "max"}
    assert [trial["configuration"] for trial in summary["trials"]] == [t["configuration"] for t in mirrored["trials"]]
    assert summary["best"]["trial"] == mirrored["best"]["trial"]
    assert summary["best"]["final_score"] == -mirrored["best"]["final_score"]
    assert summary["rank_agreement"] == mirrored["rank_agreement"]
    np.testing.assert_allclose(
        summary["partial_dependence"][0]["mean"], -np.array(mirrored["partial_dependence"][0]["mean"])
    )


def test_a_reference_outside_the_space_is_trained_but_not_told(tmp_path):
    run = study(tmp_path, reference={**REFERENCE, "update.0.rank": 128}, search=search_config(trials=5, promote=1))
    assert run.reference_in_space is False
    summary = run.run()
    assert summary is not None
    assert summary["baseline"]["in_space"] is False
    assert summary["baseline"]["final_score"] is not None
    proposed = {record["trial"]: record for record in records(tmp_path) if record["event"] == "proposed"}
    assert (proposed[4]["told"], proposed[4]["pending"]) == ([1, 2], [3])


def test_the_reference_is_located_in_the_resolved_configuration(tmp_path):
    base = {"optimizer": {"learning_rate": 1e-4, "schedule": "cosine"}, "update": [{"rank": 8, "dropout": 0.1}]}
    search = search_config()
    assert Study(tmp_path, search, SyntheticRunner(), reference={}, base=base).reference_in_space
    resolved = {**base, "update": [{"rank": 100, "dropout": 0.1}]}
    runner = SyntheticRunner()
    assert not Study(tmp_path, search, runner, reference={}, base=base, reference_config=resolved).reference_in_space
    assert not Study(tmp_path, search, runner, reference=REFERENCE, reference_config={}).reference_in_space


def test_several_trials_at_a_time(tmp_path):
    """Each proposal knows what was scored before the one before it; the rest are lies. A stop changes nothing of it."""
    search = search_config(trials=8, initial=2)
    runner = SyntheticRunner(capacity=3)
    runner.before = interrupt_at(5, 10)
    assert study(tmp_path, runner, search=search).run() is None
    assert study(tmp_path, SyntheticRunner(capacity=3), search=search).run() is not None
    whole = tmp_path / "whole"
    assert study(whole, SyntheticRunner(capacity=3), search=search).run() is not None
    assert records(tmp_path) == records(whole)
    proposed = [record for record in records(whole) if record["event"] == "proposed"]
    assert [record["source"] for record in proposed] == ["reference", *["design"] * 3, *["surrogate"] * 4]
    assert [(record["told"], record["pending"]) for record in proposed[4:]] == [
        ([0], [1, 2, 3]),
        ([0, 1], [2, 3, 4]),
        ([0, 1, 2], [3, 4, 5]),
        ([0, 1, 2, 3], [4, 5, 6]),
    ]
    events = [(record["event"], record["trial"]) for record in records(whole)[1:]]
    assert events[:8] == [("proposed", n) for n in range(3)] + [
        ("scored", 0), ("proposed", 3), ("scored", 1), ("proposed", 4), ("failed", 2)
    ]  # fmt: skip


class LastFirst(SyntheticRunner):
    """Of the trials under way, the last one started ends first."""

    def wait(self):
        self.started.reverse()
        ended = super().wait()
        self.started.reverse()
        return ended


def test_nothing_waits_for_the_slowest_trial(tmp_path):
    runner = LastFirst(capacity=2)
    summary = study(tmp_path, runner, search=search_config(trials=6, promote=2)).run()
    assert summary is not None
    early = [trial for trial, until in runner.calls if until == 10]
    assert early == [1, 2, 3, 4, 5, 0], "trial 0 holds its place while five others come and go"
    assert all(trial["status"] != "proposed" for trial in summary["trials"])
    assert sum(until == 50 for _, until in runner.calls) == 3


def test_a_fraction_of_one_finishes_every_trial(tmp_path):
    search = search_config(trials=6, promote=2, fraction=1.0)
    runner = SyntheticRunner()
    summary = study(tmp_path, runner, search=search).run()
    assert summary is not None
    assert runner.calls == [(trial, 50) for trial in range(6)]
    agreement = summary["rank_agreement"]
    assert (agreement["basis"], agreement["top_k_overlap"]) == ("all", 2)
    assert agreement["spearman"] == pytest.approx(1)
    assert summary["budget"]["steps_run"] == summary["budget"]["steps_if_all_finished"] == 300


def test_no_test_split_leaves_no_test_scores(tmp_path):
    class Untested(SyntheticRunner):
        def test(self, trial):
            return None

    summary = study(tmp_path, Untested(), search=search_config(trials=4, promote=1)).run()
    assert summary is not None
    assert summary["best"]["test_score"] is None
    assert summary["untuned"]["test_score"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"search\.seed is 0 there and 1 here"),
        ({"trials": 9}, r"search\.trials is 8 there and 9 here"),
        (
            {"space": {**SPACE, "update.0.dropout": {"uniform": (0.0, 0.2)}}},
            r"search\.space\.update\.0\.dropout\.uniform\.1 is 0\.3 there and 0\.2 here",
        ),
        (
            {"space": {key: value for key, value in SPACE.items() if key != "optimizer.schedule"}},
            r"search\.space\.optimizer\.schedule is .* there and absent here",
        ),
    ],
)
def test_the_journal_of_another_study_is_refused_and_the_difference_named(finished, changes, message):
    before = (finished[0] / "trials.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        study(finished[0], search=search_config(**changes)).run()
    with pytest.raises(UserError, match=r"model\.path is .none. there and .other. here"):
        study(finished[0], base={"name": "test", "model": {"path": "other"}}).run()
    assert (finished[0] / "trials.jsonl").read_bytes() == before
    # A study may be renamed and watched differently.
    moved = {"name": "moved", "model": {"path": "none"}, "telemetry": {"wandb": "x"}}
    assert study(finished[0], base=moved).run() is not None


def test_a_record_with_a_wrong_value_is_named(finished, tmp_path):
    lines = (finished[0] / "trials.jsonl").read_text().splitlines()
    number = next(number for number, line in enumerate(lines, 1) if json.loads(line)["event"] == "scored")
    record = json.loads(lines[number - 1]) | {"score": "good"}
    (tmp_path / "trials.jsonl").write_text(
        "\n".join([*lines[: number - 1], json.dumps(record), *lines[number:]]) + "\n"
    )
    with pytest.raises(UserError, match=f"line {number}: .*'good' is no number"):
        study(tmp_path).run()


def test_a_record_out_of_order_is_named(finished, tmp_path):
    lines = (finished[0] / "trials.jsonl").read_text().splitlines()
    (tmp_path / "trials.jsonl").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match="line 2: the record does not follow"):
        study(tmp_path).run()
    (tmp_path / "trials.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match="line 1: the first record is 'proposed'"):
        study(tmp_path).run()


def test_a_study_under_way_is_refused(finished):
    with Journal(finished[0]), pytest.raises(UserError, match="is being run by process"):
        study(finished[0]).run()


def test_more_trials_than_configurations_is_refused(tmp_path):
    space = {"optimizer.schedule": {"choice": ["cosine", "linear"]}, "update.0.rank": {"power_of_two": (8, 16)}}
    with pytest.raises(UserError, match=r"holds only 4 configurations; lower search\.trials to 4"):
        study(tmp_path, search=search_config(space=space, trials=6))


def test_a_fraction_below_one_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="less than a step"):
        study(tmp_path, search=search_config(fraction=0.001)).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.5, "ladder": [0.46]}, r"search\.fraction: 0\.5 of 10 steps is step 5, as is the rung .* 0\.46"),
        (
            {"fraction": 0.5, "ladder": [0.2, 0.24]},
            r"search\.ladder: 0\.24 of 10 steps is step 2, as is the rung .* 0\.2 ",
        ),
        ({"fraction": 0.5, "ladder": [0.04]}, r"search\.ladder: 0\.04 of 10 steps is less than a step"),
    ],
)
def test_rungs_that_fall_on_one_step_are_refused(tmp_path, changes, message):
    """Nothing is halved between them."""
    short = SyntheticRunner()
    short.steps = 10
    with pytest.raises(UserError, match=message):
        study(tmp_path, short, search=search_config(**changes)).run()
    assert milestones(search_config(fraction=0.5, ladder=[0.2, 0.36]), 10) == Milestones((2, 4), 5, 10)


def test_it_beats_random_search_at_the_same_budget(tmp_path):
    """12 trials at 20 %, two and the reference finished: 4.8 full trainings, against the best of 5 random ones."""
    regrets, random = [], []
    for seed in range(4):
        optimum = 10 ** np.random.default_rng(seed).uniform(-3.8, -2.6)
        runner = SyntheticRunner(optimum=optimum, divergence=5 * optimum, noise=0.005)
        lowest = runner.floor(
            {**REFERENCE, "optimizer.learning_rate": optimum, "update.0.rank": 32, "update.0.dropout": 0.0}
        )
        search = search_config(trials=12, promote=2, initial=5, seed=seed)
        run = study(tmp_path / str(seed), runner, search=search)
        summary = run.run()
        assert summary is not None
        regrets.append(runner.floor(summary["best"]["configuration"]) - lowest)
        generator = np.random.RandomState(seed)
        import skopt.space

        configurations = map(run.space.configuration, skopt.space.Space(run.space.to_skopt()).rvs(2000, generator))
        floors = np.array([
            runner.floor(one) if one["optimizer.learning_rate"] <= runner.divergence else np.inf
            for one in configurations
        ])  # fmt: skip
        best = np.minimum(floors.reshape(-1, 5).min(1), runner.floor(REFERENCE))
        random.append(best.mean() - lowest)
    assert np.mean(regrets) < 0.7 * np.mean(random), (regrets, random)


def test_hyperband_stops_trials_on_the_way_to_the_fraction(tmp_path):
    """Stopped trials take few steps, are told, and are never promoted; a stop and a restart change nothing."""
    pytest.importorskip("optuna")
    search = search_config(trials=14, promote=2, method="hyperband", fraction=0.4)
    runner = SyntheticRunner(capacity=2)
    summary = study(tmp_path, runner, search=search).run()
    assert summary is not None
    stopped = {trial["id"]: trial for trial in summary["trials"] if trial["status"] == "stopped"}
    assert len(stopped) >= 2
    assert 0 not in stopped
    assert all(trial["early_score"] is None and trial["final_score"] is None for trial in stopped.values())
    trained = {number: max(until for trial, until in runner.calls if trial == number) for number in range(14)}
    assert all(trained[number] < 20 for number in stopped)
    assert summary["budget"]["steps_run"] == sum(trained.values())
    whole = records(tmp_path)
    assert {record["event"] for record in whole} >= {"reported", "stopped", "scored", "promoted", "finished"}
    told = [record["told"] for record in whole if record["event"] == "proposed"][-1]
    assert set(told) & stopped.keys()
    again = tmp_path / "again"
    first = SyntheticRunner(capacity=2)
    at = next((trial, until) for trial, until in runner.calls if trial == 9)
    first.before = interrupt_at(*at)
    assert study(again, first, search=search).run() is None
    assert study(again, SyntheticRunner(capacity=2), search=search).run() is not None
    assert [record["configuration"] for record in records(again) if record["event"] == "promoted"] == [
        record["configuration"] for record in whole if record["event"] == "promoted"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [1, 3])
def test_a_ladder_takes_the_better_half_to_the_fraction(tmp_path, capacity):
    """All are scored at a tenth, half of them at the fraction; the same whether or not it was stopped on the way."""
    search = search_config(trials=11, promote=2, fraction=0.4, ladder=[0.1, 0.2])
    runner = SyntheticRunner(capacity=capacity)
    summary = study(tmp_path / "whole", runner, search=search).run()
    assert summary is not None
    diverged = {trial["id"] for trial in summary["trials"] if trial["status"] == "failed"}
    others = 10 - len(diverged - {0})
    calls = {until: [trial for trial, at in runner.calls if at == until] for until in (5, 10, 20, 50)}
    assert sorted(calls[5]) == list(range(11))
    assert len(calls[10]) == 1 + math.ceil(others / 2)
    assert len(calls[20]) == 1 + math.ceil(math.ceil(others / 2) / 2)
    assert len(calls[50]) == 3
    assert all(0 in numbers for numbers in calls.values()), "the reference is finished whatever comes"
    scored = {trial["id"] for trial in summary["trials"] if trial["early_score"] is not None}
    assert scored == set(calls[20])
    whole = records(tmp_path / "whole")
    told = [record["told"] for record in whole if record["event"] == "proposed"][-1]
    assert len(told) == 10 - capacity
    for number, at in enumerate(runner.calls[::4]):
        stopped = SyntheticRunner(capacity=capacity)
        stopped.before = interrupt_at(*at)
        directory = tmp_path / str(number)
        assert study(directory, stopped, search=search).run() is None
        again = study(directory, SyntheticRunner(capacity=capacity), search=search).run()
        assert again is not None
        assert [trial["status"] for trial in again["trials"]] == [trial["status"] for trial in summary["trials"]]
        assert again["best"]["trial"] == summary["best"]["trial"]


def test_a_journal_of_an_earlier_version_lacks_keys_that_have_their_defaults_now(tmp_path):
    data = {"train": "rows.jsonl", "prompt": "{question}", "completion": "{answer}"}
    base = Config.model_validate({"model": {"path": "m"}, "data": data, "train": {"steps": 3}}).model_dump(mode="json")
    assert study(tmp_path, base=base).run() is not None
    first, *rest = (tmp_path / "trials.jsonl").read_text().splitlines()
    header = json.loads(first)
    del header["config"]["parallel"]["trial"], header["ladder"], header["start"], header["method"]
    (tmp_path / "trials.jsonl").write_text("\n".join([json.dumps(header), *rest]) + "\n")
    assert study(tmp_path, base=base).run() is not None
    header["config"]["parallel"]["fsdp"] = 2
    (tmp_path / "trials.jsonl").write_text("\n".join([json.dumps(header), *rest]) + "\n")
    with pytest.raises(UserError, match=r"parallel\.fsdp is 2 there and 1 here"):
        study(tmp_path, base=base).run()
