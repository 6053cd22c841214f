"""Trial 0: the user's own configuration, the paper's, or a mapping; and what a study that has begun keeps."""

from __future__ import annotations

import json

import pytest
import yaml
from synthetic import SyntheticRunner, interrupt_at, records

from jaxtune.config import dotted, dump_config, load_config
from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.reports import headline
from jaxtune.reports.records import read_study
from jaxtune.search.extend import extend
from jaxtune.search.run import make_study
from jaxtune.search.settings import reference_overrides
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run_directory import RunDirectory
from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]

SPACE = (
    "space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}, update.0.rank: {power_of_two: [2, 8]}, "
    "update.0.dropout: {uniform: [0.0, 0.2]}}"
)
SEARCH = f"search={{trials: 3, promote: 1, initial: 2, {SPACE}}}"
# Neither the rate nor the rank of the paper, nor its batch, scale and schedule.
OWN = ("optimizer={learning_rate: 7e-3, schedule: linear, weight_decay: 0.01}", "update.0.rank=4", "train.steps=10")


def trial_0(config):
    """The configuration that trial 0 trains with, whole."""
    opened = object.__new__(OpenedConfig)
    opened.given = config
    opened.resolve = lambda variant: variant
    runner = object.__new__(TrainerRunner)
    runner.opened, runner._configurations = opened, {}
    return runner.configuration(reference_overrides(config))


def test_it_is_the_configuration_as_it_stands(config_file):
    config = load_config(config_file, [SEARCH, *OWN])
    assert config.search.reference == "own"
    assert trial_0(config) == config
    # It names every searched key, as the other trials do.
    assert reference_overrides(config) == {
        "optimizer.learning_rate": 7e-3, "update.0.rank": 4, "update.0.dropout": 0.0
    }  # fmt: skip


def test_the_quickstart_s_own_configuration_is_the_paper_s():
    own = load_config("configs/quickstart.yaml", ["run_dir=nowhere"])
    paper = load_config("configs/quickstart.yaml", ["run_dir=nowhere", "search.reference=paper"])
    assert dotted(trial_0(own)) == {**dotted(trial_0(paper)), "search.reference": "own"}


def test_the_paper_s_and_a_mapping(config_file):
    paper = trial_0(load_config(config_file, [SEARCH, *OWN, "search.reference=paper"]))
    assert (paper.optimizer.learning_rate, paper.optimizer.schedule, paper.optimizer.weight_decay) == (
        1e-4, "cosine", 0.0
    )  # fmt: skip
    rule = paper.update[0]
    assert (rule.rank, rule.alpha, rule.dropout, paper.train.batch_size) == (16, 32, 0.1, 16)
    for given in ("search.reference={update.0.rank: 8}", "search.reference.update.0.rank=8"):
        config = load_config(config_file, [SEARCH, *OWN, given])
        assert config.search.reference == {"update.0.rank": 8}
        changed = {key for key, value in dotted(trial_0(config)).items() if value != dotted(config)[key]}
        assert changed == {"update.0.rank"}, "what it does not name is the configuration's own"


def test_what_is_none_of_them_is_one_message(config_file):
    for given, message in (("papr", "did you mean 'paper'?"), ("3", "choose from own, paper"), ("null", "mapping")):
        with pytest.raises(UserError, match=r"search\.reference: ") as error:
            load_config(config_file, [SEARCH, f"search.reference={given}"])
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert SearchConfig(reference={}).reference == "own"


def differing(run_dir):
    study = read_study(run_dir)
    winner = headline.find_winner(study)
    assert winner is not None
    return {row["key"]: (row["value"], row["reference"]) for row in headline.settings(study, winner) if row["changed"]}


@pytest.fixture
def begin(config_file, tmp_path):
    """Runs a study over made-up scores, to its end or an interruption, with whatever reference."""

    def run(*overrides, runner=None):
        config = load_config(config_file, [SEARCH.replace("trials: 3", "trials: 6"), *OWN, *overrides])
        RunDirectory(config.directory, study=True).claim(config)
        make_study(config, runner or SyntheticRunner(divergence=1.0)).run()
        return tmp_path / "run"

    return run


def test_the_report_lists_every_key_in_which_winner_and_reference_differ(begin):
    """Also those that are not searched, and those that only one of them overrides."""
    run_dir = begin("search.reference=paper")
    found = differing(run_dir)
    unsearched = {"optimizer.schedule", "optimizer.weight_decay", "train.batch_size", "update.0.alpha"}
    assert unsearched < found.keys()
    assert found["train.batch_size"] == ("8", "16")
    assert found["optimizer.schedule"] == ("linear", "cosine")
    assert "optimizer.warmup" not in found, "both have the same, and it is not searched"


def test_the_report_of_an_own_reference_lists_searched_keys_alone(begin):
    run_dir = begin()
    found = differing(run_dir)
    assert found
    assert found.keys() <= {"optimizer.learning_rate", "update.0.rank", "update.0.dropout"}


def test_a_study_that_has_begun_keeps_its_recorded_reference(begin, config_file, tmp_path):
    """One of a version whose default was the paper's: its files say {}, its journal which values those were."""
    run_dir = begin("search.reference=paper", runner=_interrupted())
    before = records(run_dir)
    file = run_dir / "config.yaml"
    old = yaml.safe_load(file.read_text())
    old["search"]["reference"] = {}
    file.write_text(yaml.safe_dump(old))
    config = load_config(config_file, [SEARCH.replace("trials: 3", "trials: 6"), *OWN])
    directory = RunDirectory(run_dir, study=True)
    directory.check(config)
    assert reference_overrides(config) == before[0]["reference"]
    assert reference_overrides(config)["update.0.rank"] == 16
    extend(run_dir, ["search.trials=7"])
    summary = make_study(load_config(file), SyntheticRunner(divergence=1.0)).run()
    assert summary is not None
    assert records(run_dir)[: len(before)] == before
    assert summary["baseline"]["configuration"] == before[0]["reference"]
    # What is named stands against the journal, as before.
    named = load_config(
        config_file, [SEARCH.replace("trials: 3", "trials: 7"), *OWN, "search.reference.update.0.rank=2"]
    )
    with pytest.raises(UserError, match=r"search\.reference"):
        make_study(named, SyntheticRunner()).run()


def _interrupted():
    runner = SyntheticRunner(divergence=1.0)
    runner.before = interrupt_at(3, 10)
    return runner


def test_a_journal_that_cannot_be_read_is_told_by_its_reader(config_file, tmp_path):
    config = load_config(config_file, [SEARCH, *OWN])
    (tmp_path / "run").mkdir()
    for text in ("", "{", "[]", json.dumps({"event": "study"})):
        (tmp_path / "run" / "trials.jsonl").write_text(text)
        assert reference_overrides(config)["optimizer.learning_rate"] == 7e-3
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match=r"trials\.jsonl"):
        make_study(config, SyntheticRunner()).run()
