"""The ablation: on curves whose every hyperparameter has a known effect, and through the command on a tiny task."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from scipy import stats

from jaxtune.cli import main
from jaxtune.config.metrics import Goal
from jaxtune.experiments import ablation
from tests.experiments.stops import interrupt_in_turn
from tests.search.synthetic import REFERENCE

WINNER = {
    "optimizer.learning_rate": 1e-3,  # the best rate; the reference's is ten times lower: 0.15 worse
    "update.0.rank": 16,  # the reference's own
    "update.0.dropout": 0.2,  # 0.015 worse than the reference's
    "optimizer.schedule": "linear",  # 0.02 worse than the reference's
}
SEARCH = (
    "search={trials: 4, promote: 1, initial: 3, fraction: 0.2, space: {optimizer.learning_rate: {log_uniform: "
    "[1e-2, 1e-1]}, update.0.rank: {power_of_two: [1, 8]}}, reference: {optimizer.learning_rate: 1e-4, "
    "update.0.rank: 1}}"
)


@pytest.fixture
def found(monkeypatch):
    """The search that is run first; its winner can be changed."""
    best = {"trial": 3, "configuration": WINNER, "final_score": 0.31, "test_score": 0.4}
    summary = {"best": best, "baseline": {"final_score": 0.5}, "trials": [{}] * 12, "budget": {"steps_run": 7}}
    monkeypatch.setattr(ablation, "run_search", lambda *_, **__: summary)
    return best


def run(config):
    return ablation.run(config, command="jaxtune study ablation mine.yaml")


def test_effects_are_those_of_the_curves(make_config, runner, found, tmp_path):
    summary = run(make_config())
    assert [effect["key"] for effect in summary["effects"]] == [
        "optimizer.learning_rate", "update.0.dropout", "optimizer.schedule"
    ]  # fmt: skip
    assert summary["unchanged"] == ["update.0.rank"]
    seeds = range(1, 6)
    winner = [runner.value({**WINNER, "train.seed": seed}, 50) for seed in seeds]
    for effect in summary["effects"]:
        key = effect["key"]
        back = {**WINNER, key: REFERENCE[key]}
        assert (effect["winner"], effect["reference"]) == (WINNER[key], REFERENCE[key])
        scores = [runner.value({**back, "train.seed": seed}, 50) for seed in seeds]
        wanted = stats.ttest_rel(scores, winner).confidence_interval(0.95)
        measured = effect["validation"]
        assert measured["difference"] == pytest.approx(np.mean(scores) - np.mean(winner))
        assert (measured["low"], measured["high"]) == (pytest.approx(wanted.low), pytest.approx(wanted.high))
        # Without noise over seeds, and with the same examples, the test difference is exact in every draw.
        gap = runner.floor(back) - runner.floor(WINNER)
        assert effect["test"]["difference"] == pytest.approx(gap)
        assert [effect["test"]["over_examples"][end] for end in ("low", "high")] == pytest.approx([gap, gap])
    verdicts = {effect["key"]: effect["verdict"] for effect in summary["effects"]}
    assert verdicts["optimizer.learning_rate"] == "mattered"
    assert verdicts["optimizer.schedule"] == "harmful"
    assert summary["whole"]["verdict"] == "mattered"
    names = [variant["name"] for variant in summary["variants"]]
    assert names == ["reference", "winner", "optimizer.learning_rate", "update.0.dropout", "optimizer.schedule"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert ET.parse(tmp_path / "out" / "effects.svg").getroot().tag.endswith("svg")
    assert "jaxtune study ablation mine.yaml" in (tmp_path / "out" / "README.md").read_text()


def test_a_higher_score_that_is_better_turns_the_verdicts(make_config, runner, found):
    runner.sign = -1.0
    summary = run(make_config("evaluation.task=extraction", "search.objective=f1"))
    verdicts = {effect["key"]: effect["verdict"] for effect in summary["effects"]}
    assert verdicts["optimizer.learning_rate"] == "mattered"
    assert verdicts["optimizer.schedule"] == "harmful"
    assert summary["effects"][0]["key"] == "optimizer.learning_rate"


def test_a_value_whose_absence_diverges_mattered(make_config, runner, found, tmp_path):
    config = make_config("search.reference={optimizer.learning_rate: 9e-3, update.0.rank: 32}")
    summary = run(config)
    effect = summary["effects"][0]
    assert (effect["key"], effect["verdict"], effect["validation"]["diverged"]) == (
        "optimizer.learning_rate", "mattered", 5
    )  # fmt: skip
    assert effect["validation"]["difference"] is None
    assert "diverged" in (tmp_path / "out" / "README.md").read_text()


def test_a_reference_that_won_leaves_nothing_to_set_back(make_config, runner, found, tmp_path):
    found["configuration"] = dict(REFERENCE)
    summary = run(make_config())
    assert (summary["effects"], summary["whole"]) == ([], None)
    assert [variant["name"] for variant in summary["variants"]] == ["reference"]
    assert "nothing to set back" in (tmp_path / "out" / "README.md").read_text()


def test_an_interrupted_ablation_goes_on(make_config, runner, found, tmp_path):
    whole = run(make_config(f"run_dir={tmp_path / 'whole'}"))
    runner.before = interrupt_in_turn((2, 50), (11, 50))
    config = make_config()
    assert [run(config), run(config)] == [None, None]
    again = run(config)
    for summary in (whole, again):
        del summary["budget"]
    assert again == whole


@pytest.mark.slow
def test_the_command_on_a_tiny_task_and_on_a_search_that_is_finished(config_file, tmp_path, capsys):
    common = [str(config_file), SEARCH, "train.batch_size=16", "train.steps=10", "train.log_every=10"]
    study = ["study.ablation.seeds=[1, 2]", f"run_dir={tmp_path / 'ablation'}", f"study.output={tmp_path / 'out'}"]
    assert main(["study", "ablation", *common, *study, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["trials"], planned["steps"]) == (4 * 2 + 4, 4 * 2 * 10 + 4 * 2 + 2 * 8)
    assert planned["memory"]["free"] > planned["memory"]["total"] > 0
    assert main(["study", "ablation", *common, *study, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["effects"][0]["key"] == "optimizer.learning_rate"
    assert summary["effects"][0]["validation"]["pairs"] == 2
    assert summary["whole"]["test"]["over_examples"] is not None
    assert summary["budget"]["compilations"] == 1
    # The search that was run first serves a second ablation, with other seeds.
    finished = f"study.ablation.search={tmp_path / 'ablation' / 'search'}"
    second = ["study.ablation.seeds=[3, 4]", f"run_dir={tmp_path / 'second'}", f"study.output={tmp_path / 'out2'}"]
    assert main(["study", "ablation", *common, *second, finished, "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["search"] == summary["search"]
    assert other["variants"][1]["validation"] != summary["variants"][1]["validation"]
    third = [f"run_dir={tmp_path / 'third'}", finished]
    assert main(["study", "ablation", *common, *third, "train.steps=11"]) == 2
    assert "train.steps is 10 there and 11 here" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["study.ablation.seeds=[1, 1]"], ["study.ablation.seeds", "twice"]),
        (["study.ablation.seeds=[1]"], ["study.ablation.seeds", "at least 2"]),
        (["study.ablation.search=nowhere"], ["study.ablation.search", "finished search"]),
        (["search=null"], ["search", "required"]),
        (
            ["search.space={train.seed: {integer: [0, 9]}, update.0.rank: {power_of_two: [1, 8]}}"],
            ["search.space.train.seed", "study.ablation.seeds"],
        ),
    ],
)
def test_wrong_input_is_refused_before_training(config_file, tmp_path, capsys, overrides, parts):
    before = sorted(tmp_path.rglob("*"))
    assert main(["study", "ablation", str(config_file), SEARCH, *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("jaxtune: ") == 1
    assert all(part in printed.err for part in parts), printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("difference", "low", "high", "better", "verdict"),
    [
        (0.2, 0.1, 0.3, "min", "mattered"),
        (0.2, 0.1, 0.3, "max", "harmful"),
        (-0.2, -0.3, -0.1, "max", "mattered"),
        (0.2, -0.1, 0.5, "min", "unclear"),
        (0.009, 0.008, 0.010, "min", "negligible"),
        (0.011, 0.010, 0.012, "min", "mattered"),
        (0.2, None, None, "min", "unclear"),
    ],
)
def test_a_verdict_needs_an_interval_beyond_zero_and_a_share_of_the_whole(difference, low, high, better, verdict):
    measured = {"difference": difference, "low": low, "high": high, "pairs": 3, "diverged": 0}
    assert ablation._verdict(measured, 1.0 if better == "min" else -1.0, Goal(better)) == verdict


def test_variants_differ_from_the_winner_in_one_key_each(make_config):
    variants = ablation.make_variants(make_config(), WINNER)
    assert variants[1].configuration == WINNER
    for variant in variants[2:]:
        changed = {key for key in WINNER if variant.configuration[key] != WINNER[key]}
        assert changed == {variant.name}
