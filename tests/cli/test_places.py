"""Where commands read and write: run directories that were copied or moved, homes, links, pipes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from jaxtune.cli import main
from jaxtune.config import load_config
from jaxtune.errors import UserError
from jaxtune.search.run import make_study, search
from jaxtune.training.run_directory import RunDirectory

sys.path.insert(0, str(Path(__file__).parent.parent / "search"))
from synthetic import SyntheticRunner, interrupt_at, records

SEARCH = (
    "search={trials: 4, promote: 1, initial: 4, space: {optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}, "
    "update.0.rank: {power_of_two: [2, 64]}}}"
)


@pytest.fixture
def result(capsys):
    """Runs a command with --json and returns the one object it prints."""

    def run(*arguments):
        code = main([*map(str, arguments), "--json"])
        output = capsys.readouterr()
        assert code == 0, output.err
        return json.loads(output.out)

    return run


def test_a_copied_run_is_the_copy(result, config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    summary = result("train", config_file, "train.steps=4", "data.test=null", "run_dir=~/one")
    one, two = tmp_path / "home" / "one", tmp_path / "two"
    assert summary["run_dir"] == str(one)
    assert not (tmp_path / "~").exists()
    shutil.copytree(one, two)
    shutil.rmtree(one / "checkpoints")
    validation = ("--split", "validation")
    evaluated = result("evaluate", "two/config.yaml", *validation)
    assert evaluated["subject"] == "two at step 4"
    assert evaluated["metrics"]["loss"] == pytest.approx(summary["metrics"]["validation_loss"], rel=1e-5)
    again = result("train", two / "config.yaml")
    assert again == {**summary, "run_dir": str(two), "adapter": {"path": str(two / "adapter"), "step": 4}}
    # What is said on the command line holds.
    assert main(["evaluate", "two/config.yaml", *validation, f"run_dir={one}"]) == 2
    assert f"{one / 'checkpoints'}: no checkpoint" in capsys.readouterr().err
    # Paths of options have homes as well, with and without a shell's help.
    assert result("export", "two/config.yaml", "--peft=~/adapter")["path"] == str(tmp_path / "home" / "adapter")
    assert (tmp_path / "home" / "adapter" / "adapter_config.json").is_file()
    assert main(["evaluate", "two/config.yaml", "--predictions=~nobody-here/x"]) == 2
    assert "--predictions: ~nobody-here/x: there is no user 'nobody-here'" in capsys.readouterr().err
    # Predictions go through a link to its file.
    (tmp_path / "predictions.jsonl").write_text("old")
    (tmp_path / "link").symlink_to("predictions.jsonl")
    task = ("evaluation.task=extraction", "evaluation.max_new_tokens=1", "data.validation.limit=8")
    result("evaluate", "two/config.yaml", *validation, *task, "--predictions", "link")
    assert (tmp_path / "link").is_symlink()
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 8


@pytest.fixture
def begun(config_file, tmp_path):
    """A study of made-up scores that was stopped in its last early trial."""
    config = load_config(config_file, [SEARCH])
    RunDirectory(config.directory, study=True).claim(config)
    runner = SyntheticRunner(divergence=1.0)
    runner.before = interrupt_at(3, 10)
    assert make_study(config, runner).run() is None
    return tmp_path / "run"


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_a_moved_study_goes_on_where_it_is(begun, tmp_path, result, how):
    there = records(begun)
    other = Path(how(begun, tmp_path / "other"))
    changed = result("study", "extend", other, "search.promote=2", "--no-run")
    assert changed["changed"] == {"promote": 2}
    config = load_config(other / "config.yaml")
    assert config.directory == str(other)
    RunDirectory(config.directory, study=True).check(config)
    summary = make_study(config, SyntheticRunner(divergence=1.0)).run()
    assert summary is not None
    assert records(other)[: len(there)] == there
    assert len(records(other)) > len(there)
    assert not (tmp_path / "run").exists() or records(tmp_path / "run") == there
    # What has ended names the directory as it is now.
    last = Path(shutil.move(other, tmp_path / "last"))
    ended = search(load_config(last / "config.yaml"))
    assert ended is not None
    assert f"{last}/config.yaml" in ended["best"]["command"]
    assert f"run_dir={last}-winner" in ended["best"]["command"]


def test_a_trial_is_evaluated_by_itself_and_not_trained_behind_its_study(begun, config_file):
    trial = begun / "trials" / "001"
    shutil.copy(begun / "config.yaml", trial / "config.yaml")
    (trial / "metrics.jsonl").touch()
    config = load_config(trial / "config.yaml")
    assert config.directory == str(trial)
    with pytest.raises(UserError, match=r"is a trial of the study in .*run.*run_dir="):
        RunDirectory(config.directory).check(config)
