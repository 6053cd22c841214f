"""The early-score experiment: on curves with a known order, and through the command on a tiny task."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from scipy import stats

from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.experiments import early_score
from jaxtune.experiments.design_size import known_alone, overlap_by_size
from jaxtune.search.journal import read_journal
from tests.experiments.stops import interrupt_in_turn
from tests.tiny_task import command

SEARCH = (
    "search={trials: 7, promote: 2, population: 2, space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}, "
    "update.0.rank: {power_of_two: [2, 8]}}, reference: {optimizer.learning_rate: 1e-3}}"
)
FRACTIONS = "study.early_score.fractions=[0.1, 0.2, 1.0]"
# What may differ between two runs of one experiment.
EFFORT = ("budget", "command", "machine")


def run(config, **options):
    return early_score.run(config, command="jaxtune study early-score mine.yaml", **options)


def results(summary):
    return {key: value for key, value in summary.items() if key not in EFFORT}


def test_figures_are_those_of_the_curves(make_config, runner, tmp_path):
    config = make_config("study.bootstrap=200")
    summary = run(config)
    design = early_score.design(config)
    assert [trial["configuration"] for trial in summary["trials"]] == design
    assert design[0] == {**config.search.reference}
    scores = {
        name: np.array([runner.value(values, round(float(name) * 50)) for values in design])
        for name in summary["by_fraction"]
    }
    assert list(scores) == ["0.05", "0.1", "0.2", "0.4", "0.7", "1"]
    final = scores["1"]
    kept = np.isfinite(final)
    assert 0 < summary["final"]["diverged"] == (~kept).sum()
    ranked = np.argsort(np.where(kept, final, math.inf))
    for name, early in scores.items():
        entry = summary["by_fraction"][name]
        assert entry["spearman"]["value"] == pytest.approx(stats.spearmanr(early[kept], final[kept]).statistic)
        assert entry["kendall"]["value"] == pytest.approx(stats.kendalltau(early[kept], final[kept]).statistic)
        order = np.argsort(np.where(kept, early, math.inf))
        assert entry["top_5_overlap"]["value"] == len(set(order[:5]) & set(ranked[:5]))
        assert entry["chosen"] == order[0]
        assert entry["regret"]["value"] == pytest.approx(final[order[0]] - final[ranked[0]])
        assert entry["regret_promoted"]["value"] == pytest.approx(final[order[:3]].min() - final[ranked[0]])
        for figure in ("spearman", "kendall", "top_5_overlap", "regret", "regret_promoted"):
            assert entry[figure]["low"] <= entry[figure]["value"] <= entry[figure]["high"]
        until = round(float(name) * 50)
        assert entry["steps_saved"] == pytest.approx(1 - (12 * until + 50 - until) / 600)
        assert entry["steps_saved_promoted"] == pytest.approx(1 - (12 * until + 3 * (50 - until)) / 600)
    assert summary["by_fraction"]["1"]["spearman"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert summary["paper"]["top_5_overlap"] == 4
    # A trial that has diverged is not trained on.
    assert len(runner.calls) == 6 * kept.sum() + (~kept).sum()
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text()) == summary
    page = (out / "README.md").read_text()
    assert "jaxtune study early-score mine.yaml" in page
    for figure in out.glob("*.svg"):
        assert f"({figure.name})" in page
        assert ET.parse(figure).getroot().tag.endswith("svg")
    assert len(list(out.glob("*.svg"))) == 2


def test_a_score_that_is_better_when_higher(make_config, runner, tmp_path):
    lower = run(make_config("study.bootstrap=200"))
    runner.sign = -1.0
    overrides = ("evaluation.task=extraction", "search.objective=f1", f"run_dir={tmp_path / 'higher'}")
    higher = run(make_config("study.bootstrap=200", *overrides))
    for name, entry in lower["by_fraction"].items():
        assert higher["by_fraction"][name]["regret"] == pytest.approx(entry["regret"])
        assert higher["by_fraction"][name]["spearman"] == entry["spearman"]
    assert higher["final"]["highest"] == pytest.approx(-lower["final"]["lowest"])


def test_an_interrupted_experiment_goes_on(make_config, runner, tmp_path):
    whole = run(make_config(f"run_dir={tmp_path / 'whole'}", "study.bootstrap=100"))
    calls, runner.calls = runner.calls, []
    runner.before = interrupt_in_turn((3, 5), (0, 20), (9, 50))
    config = make_config("study.bootstrap=100")
    assert [run(config) for _ in range(3)] == [None] * 3
    assert results(run(config)) == results(whole)
    assert sorted(set(runner.calls)) == sorted(calls)
    assert len(runner.calls) == len(calls) + 3
    # What is computed from the trials may change afterwards; where they were scored may not.
    assert run(make_config("study.bootstrap=150"))["interval"]["bootstrap"] == 150
    assert len(runner.calls) == len(calls) + 3


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["study.early_score.fractions=[0.2, 1.5]"], ["study.early_score.fractions.1", "less than or equal to 1"]),
        (["study.early_score.fractions=[0.2, 0.1, 1.0]"], ["study.early_score.fractions", "rising"]),
        (["study.early_score.fractions=[0.2, 0.5]"], ["study.early_score.fractions", "end with 1.0"]),
        (["study.early_score.fractions=[0.2, half]"], ["study.early_score.fractions.1", "half"]),
        (["study.early_score.fraction=0.2"], ["study.early_score.fraction", "'fractions'"]),
        (["study.early-score.fractions=[1.0]"], ["study.early-score", "'early_score'"]),
        (["study.bootstrap=3"], ["study.bootstrap", "100"]),
        (["search.trials=4", "search.promote=2"], ["search.trials", "6 or more"]),
        (["search.trials=5"], ["search.trials", "6 or more"]),
        (["search=null"], ["search", "required"]),
        (["data.validation=null"], ["data.validation"]),
        (["search.space={optimizer.schedule: {choice: [cosine, linear]}}"], ["search.trials", "2 configurations"]),
        (["train.steps=6"], ["study.early_score.fractions", "less than a step"]),
        (["train.steps=12"], ["study.early_score.fractions", "step 1"]),
        (["study.early_score.test=true", "data.test=null"], ["study.early_score.test", "data.test"]),
        (["search.metrics=[exact_match]"], ["search.metrics.0", "evaluation.task"]),
        (["study.output=run.yaml/here"], ["study.output", "no folder"]),
    ],
)
def test_wrong_input_is_refused_before_training(config_file, tmp_path, monkeypatch, capsys, overrides, parts):
    monkeypatch.chdir(tmp_path)
    search = SEARCH.replace("population: 2, ", "")
    before = sorted(tmp_path.rglob("*"))
    assert main(["study", "early-score", str(config_file), search, *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("jaxtune: ") == 1
    assert all(part in printed.err for part in parts), printed.err
    assert sorted(tmp_path.rglob("*")) == before


def test_other_fractions_are_another_experiment(make_config, runner, config_file, tmp_path):
    run(make_config("study.bootstrap=100"))
    with pytest.raises(UserError, match=r"settings\.fractions"):
        run(make_config("study.early_score.fractions=[0.5, 1.0]"))


def test_too_many_diverged_trials_leave_no_order(make_config, runner):
    runner.divergence = 2e-5
    with pytest.raises(UserError, match="diverged"):
        run(make_config(trials=6))


@pytest.mark.slow
def test_the_command_killed_and_started_again_ends_as_if_it_had_not_been(config_file, tmp_path, capsys):
    def arguments(name: str) -> list[str]:
        places = [f"run_dir={tmp_path / name}", f"study.output={tmp_path / name}-out"]
        return ["study", "early-score", str(config_file), SEARCH, FRACTIONS, "train.batch_size=16", *places, "--json"]

    killed = command(*arguments("killed"), devices=8)
    journal = tmp_path / "killed" / "trials.jsonl"
    while killed.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 13):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    scored = sum(record["event"] == "scored" for record in read_journal(tmp_path / "killed"))
    assert 0 < scored < 14
    assert main(arguments("whole")) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(arguments("killed")) == 0
    again = json.loads(capsys.readouterr().out)
    assert results(again) == results(whole)
    assert [trial["status"] for trial in whole["trials"]] == ["finished"] * 7
    assert set(whole["by_fraction"]) == {"0.1", "0.2", "1"}
    assert whole["budget"]["compilations"] == 1
    assert whole["budget"]["steps_run"] == 7 * 20
    # Three records a trial, scored once at each step, in both.
    for name in ("whole", "killed"):
        steps = [(r["trial"], r["step"]) for r in read_journal(tmp_path / name) if r["event"] in ("scored", "finished")]
        assert sorted(steps) == [(trial, step) for trial in range(7) for step in (2, 4, 20)]
    # A search does not take these trials for its own.
    assert main(["search", str(config_file), SEARCH, "train.batch_size=16", FRACTIONS, *arguments("whole")[6:8]]) == 2
    assert "early-score" in capsys.readouterr().err


def test_an_experiment_of_an_earlier_version_goes_on(make_config, runner, tmp_path):
    """Keys of the configuration that have come since stand at their defaults in its journal."""
    whole = run(make_config("study.bootstrap=100"))
    path = tmp_path / "run" / "trials.jsonl"
    first, *rest = path.read_text().splitlines()
    header = json.loads(first)
    del header["config"]["parallel"]["trial"]
    path.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    assert results(run(make_config("study.bootstrap=100"))) == results(whole)
    header["config"]["parallel"]["fsdp"] = 2
    path.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    with pytest.raises(UserError, match=r"another study: parallel\.fsdp is 2 there and 1 here"):
        run(make_config("study.bootstrap=100"))


def test_other_metrics_sizes_and_the_test_split_stand_beside_the_score(make_config, runner, monkeypatch, tmp_path):
    """Exact match is 0 for all at first; at the end it follows the score, and every finished trial is tested."""
    scored = runner.run

    def with_answers(trial, until):
        outcome = scored(trial, until)
        exact = 0.0 if until < 20 or outcome.failed else round(1 - runner.value(trial.configuration, until), 2)
        return dataclasses.replace(outcome, metrics={**outcome.metrics, "exact_match": exact})

    monkeypatch.setattr(runner, "run", with_answers)
    task = ["evaluation.task=extraction", "search.metrics=[exact_match]", "study.early_score.test=true"]
    summary = run(make_config("study.bootstrap=100", *task))
    exact = summary["by_metric"]["exact_match"]
    finished = [trial for trial in summary["trials"] if trial["final_score"] is not None]
    assert exact["direction"] == "max"
    assert [entry["zeros"] for entry in exact["by_fraction"].values()] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert exact["by_fraction"]["1"]["top_5_overlap"]["value"] == 5
    for trial in finished:
        assert trial["metrics"]["exact_match"]["1"] == pytest.approx(1 - trial["final_score"], abs=0.0051)
        assert trial["test_metrics"]["loss"] == trial["test_score"]
    assert sorted(runner.tests, key=str) == sorted([None, *(trial["id"] for trial in finished)], key=str)
    sizes = summary["by_design_size"]
    assert [entry["trials"] for entry in sizes] == [8, 12]
    # The whole design has one overlap, in whatever order its trials stand.
    assert sizes[-1]["expected"] == summary["by_fraction"]["0.2"]["top_5_overlap"]["value"]
    assert sizes[-1]["by_chance"] == pytest.approx(25 / 12)
    assert 0 <= summary["rate_alone"]["overlap"] <= 5
    page = (tmp_path / "out" / "README.md").read_text()
    assert "cannot be tested at this length" in page
    assert "## By exact match" in page
    assert "## In designs of other sizes" in page


def test_one_hyperparameter_that_decides_all_is_enough():
    rates = np.geomspace(1e-5, 1e-1, 15)
    final = (np.log(rates) - np.log(1e-3)) ** 2
    found = known_alone(rates.tolist(), np.where(rates > 0.05, np.inf, final))
    assert found["overlap"] == 5
    assert found["spearman"] > 0.9
    # Ties are broken by chance: of equal early scores no order is known.
    even = overlap_by_size(np.zeros(10), final[:10], claimed=4)
    assert even[-1]["expected"] == pytest.approx(2.5, abs=0.1)
