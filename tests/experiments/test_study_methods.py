"""Update methods beside each other: on curves with a known best rate for each, and through the command."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.cli import main
from jaxtune.config import load_config
from jaxtune.config.metrics import METRICS
from jaxtune.errors import UserError
from jaxtune.experiments import methods
from jaxtune.experiments.method_scores import compared_scores
from jaxtune.experiments.rates import best_rate, first_rates, next_rate, on_end
from jaxtune.search.outcome import TestOutcome
from tests.experiments.stops import interrupt_in_turn
from tests.search.synthetic import SyntheticRunner

METHOD, RATE = "update.0.method", "optimizer.learning_rate"
COSTS = {"trained_parameters": 10, "share": 0.01, "optimizer_bytes": 80, "file": "adapter", "file_bytes": 40}


class MethodRunner(SyntheticRunner):
    """Each method has a best rate, and a floor, of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.best: dict[str, tuple[float, float] | None] = {
            "low_rank": (1e-3, 0.30), "dora": (3e-4, 0.25), "lora_fa": (1e-1, 0.40)
        }  # fmt: skip

    opened: Any

    def floor(self, configuration) -> float:
        method = configuration.get(METHOD, "low_rank")
        known = self.best[method]
        assert known is not None
        rate, floor = known
        return floor + 0.05 * math.log10(configuration.get(RATE, 1e-3) / rate) ** 2

    def value(self, configuration, step: int) -> float:
        if self.best[configuration[METHOD]] is None:
            return math.nan
        return super().value({"update.0.rank": 16, **configuration}, step)


@pytest.fixture
def runner(monkeypatch) -> MethodRunner:
    synthetic = MethodRunner(divergence=1.0, noise=1e-6)
    synthetic.opened = SimpleNamespace(fingerprints={})
    monkeypatch.setattr(methods, "open_runner", lambda *_, **__: synthetic)
    monkeypatch.setattr(methods, "method_costs", lambda *_: COSTS)
    return synthetic


@pytest.fixture
def make(config_file, tmp_path):
    """Makes a configuration that compares methods from the rate 1e-3."""

    def config(*overrides: str, compare: str = "[low_rank, dora, lora_fa]"):
        common = [f"study.methods.compare={compare}", f"study.output={tmp_path / 'out'}", f"{RATE}=1e-3"]
        return load_config(config_file, [*common, *overrides])

    return config


def run(config) -> Any:
    return methods.run(config, command="jaxtune study methods mine.yaml")


@given(st.floats(1e-7, 1.0), st.integers(3, 9), st.floats(-9, 1), st.integers(0, 9))
def test_rates_go_on_until_the_best_is_inside(middle, count, optimum, further):
    rates = first_rates(middle, count)
    assert rates == sorted(set(rates))
    assert len(rates) == count
    assert middle == pytest.approx(rates[count // 2], rel=6e-3)
    scores = {rate: (math.log10(rate) - optimum) ** 2 for rate in rates}
    while len(scores) < count + further and (rate := next_rate(scores)) is not None:
        assert rate not in scores
        scores[rate] = (math.log10(rate) - optimum) ** 2
    steps = np.diff(np.log10(sorted(scores)))
    assert steps == pytest.approx(0.5, abs=5e-3)
    best = best_rate(scores)
    assert best is not None
    if not on_end(scores):
        assert abs(math.log10(best) - optimum) <= 0.26
    else:
        assert len(scores) == count + further


def test_where_all_rates_diverge_lower_ones_follow():
    scores = dict.fromkeys(first_rates(1e-2, 3), math.inf)
    assert (best_rate(scores), on_end(scores)) == (None, True)
    assert next_rate(scores) == pytest.approx(1e-3, rel=1e-2)


def test_each_method_is_compared_at_its_own_rate(make, runner, tmp_path):
    summary = run(make("study.methods.rate_steps=5"))
    found = {entry["name"]: entry for entry in summary["methods"]}
    assert {name: entry["rate"] for name, entry in found.items()} == {
        "low_rank": 1e-3, "dora": 3.16e-4, "lora_fa": 1e-1
    }  # fmt: skip
    assert {name: len(entry["rates"]) for name, entry in found.items()} == {"low_rank": 5, "dora": 5, "lora_fa": 8}
    assert not any(entry["on_end"] for entry in found.values())
    configurations = [
        json.loads(line)["configuration"]
        for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()
        if '"proposed"' in line
    ]
    rates, finals = configurations[: 5 + 5 + 8], configurations[5 + 5 + 8 :]
    assert all(one["train.steps"] == 5 and "train.seed" not in one for one in rates)
    assert [one["train.seed"] for one in finals] == [1, 2, 3] * 3
    assert not any("train.steps" in one for one in finals)
    assert summary["best"] == "dora"
    gap = runner.floor({METHOD: "dora", RATE: 3.16e-4}) - runner.floor({METHOD: "low_rank", RATE: 1e-3})
    against = found["dora"]["against"]
    # The same examples and no noise over seeds: the difference is exact in every draw.
    assert [against[end] for end in ("difference", "low", "high")] == pytest.approx([gap] * 3)
    assert against["told_apart"]
    assert found["low_rank"]["against"] is None
    assert found["dora"]["share"] == COSTS["share"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "Best is dora" in page
    assert summary["next"] in page
    assert f"{METHOD}=dora" in summary["next"]
    for figure in ("scores", "rates"):
        assert ET.parse(tmp_path / "out" / f"{figure}.svg").getroot().tag.endswith("svg")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_a_method_may_say_more_than_its_name(make, runner):
    compare = "{low_rank: {}, wide: {update.0.rank: 64, optimizer.learning_rate: 1e-2, update.0.method: lora_fa}}"
    runner.best["lora_fa"] = runner.best["low_rank"]
    summary = run(make(compare=compare))
    wide = summary["methods"][1]
    assert wide["overrides"] == {"update.0.rank": 64, METHOD: "lora_fa"}
    assert 1e-2 in [one["rate"] for one in wide["rates"]]
    # Equal floors at equal rates: nothing is told apart.
    assert not wide["against"]["told_apart"]


def test_a_method_that_diverges_is_left_without_a_score(make, runner, tmp_path):
    runner.best["lora_fa"] = None
    summary = run(make("study.methods.further=1"))
    lost = summary["methods"][2]
    assert (lost["rate"], lost["score"], lost["trials"], len(lost["rates"])) == (None, None, [], 6)
    assert "With every rate lora_fa diverged" in (tmp_path / "out" / "README.md").read_text()
    runner.best["dora"] = None
    with pytest.raises(UserError, match="2 of 3 methods diverged"):
        run(make(f"run_dir={tmp_path / 'other'}", "study.methods.further=0"))


def test_it_goes_on_after_stops(make, runner, tmp_path):
    whole = run(make(f"run_dir={tmp_path / 'whole'}"))
    runner.before = interrupt_in_turn((3, 50), (16, 50), (20, 50))
    config = make()
    assert [run(config) for _ in range(3)] == [None] * 3
    again = run(config)
    for summary in (whole, again):
        del summary["budget"], summary["next"]
    assert again == whole
    with pytest.raises(UserError, match="rates"):
        run(make("study.methods.rates=3"))


def test_intervals_are_of_seeds_and_documents():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 80)
    seeds = rng.normal(0, 0.1, 3)

    def outcomes(shift: float) -> list[TestOutcome]:
        return [TestOutcome(0.0, {}, (hard + seed + shift).tolist()) for seed in seeds]

    tests = {"first": outcomes(0.0), "worse": outcomes(0.5), "same": outcomes(0.0)}
    found = compared_scores(tests, "first", METRICS["loss"], samples=500, confidence=0.9)
    mean = float(hard.mean() + seeds.mean())
    score = found["first"]["score"]
    assert score["value"] == pytest.approx(mean)
    # As wide as documents and seeds make it: their variances add up.
    spread = math.sqrt(hard.var() / 80 + seeds.var() / 3)
    assert score["high"] - score["low"] == pytest.approx(2 * 1.645 * spread, rel=0.2)
    assert found["worse"]["against"]["difference"] == pytest.approx(0.5)
    assert found["worse"]["against"]["low"] == pytest.approx(0.5)
    assert [found[name]["against"]["told_apart"] for name in ("worse", "same")] == [True, False]


@pytest.mark.parametrize(
    ("compare", "overrides", "parts"),
    [
        ("[low_rank]", [], ["study.methods.compare", "at least two"]),
        ("[low_rank, dorra]", [], ["study.methods.compare.dorra", "did you mean 'dora'"]),
        ("[low_rank, low_rank]", [], ["study.methods.compare", "twice"]),
        ("{low_rank: {}, bitfit: {update: [{match: 'layers.**', method: bitfit}]}}", [], ["compare.bitfit", "is for"]),
        ("{low_rank: {}, dora: {train.steps: 9}}", [], ["dora", "train.steps", "only update and optimizer"]),
        ("{low_rank: {}, dora: {update.0.rnk: 9}}", [], ["dora", "rnk"]),
        ("{low_rank: {}, same: {update.0.method: low_rank}}", [], ["same", "leave one out"]),
        ("[low_rank, dora]", ["data.test=null"], ["data.test", "required"]),
        ("[low_rank, dora]", ["study.methods.seeds=[1, 1]"], ["study.methods.seeds", "twice"]),
        ("[low_rank, dora]", ["study.methods.score=f1"], ["study.methods.score", "f1"]),
    ],
)
def test_wrong_input_is_one_message(make, compare, overrides, parts):
    with pytest.raises(UserError) as raised:
        run(make(*overrides, compare=compare))
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.slow
def test_the_command_on_a_tiny_task(config_file, tmp_path, capsys):
    section = "{compare: [low_rank, dora], rates: 3, further: 0, rate_steps: 2, seeds: [1, 2]}"
    given = [str(config_file), f"study.methods={section}", f"study.output={tmp_path / 'out'}", f"{RATE}=3e-3"]
    given += ["train.batch_size=16", "train.steps=4", "train.log_every=4"]
    assert main(["study", "methods", *given, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["trials"], planned["steps"]) == (6 + 4, 6 * 2 + 4 * 4)
    assert main(["study", "methods", *given, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    low_rank, dora = summary["methods"]
    assert dora["trained_parameters"] > low_rank["trained_parameters"] > 0
    assert low_rank["optimizer_bytes"] >= 8 * low_rank["trained_parameters"]
    assert [one["trial"] for one in low_rank["rates"]] == [0, 1, 2]
    assert all(len(each["test"]) == 2 and each["diverged"] == 0 for each in (low_rank, dora))
    assert summary["untuned"] is not None
    assert main(["study", "status", str(tmp_path / "run")]) == 0
