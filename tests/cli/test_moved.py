"""Runs and studies whose configuration has relative paths, used from elsewhere and moved."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from jaxtune.cli import main
from jaxtune.config import load_config
from jaxtune.config.paths import located
from jaxtune.errors import UserError
from jaxtune.experiments import ablation
from jaxtune.search.run import make_study
from jaxtune.training.memory import check_base
from jaxtune.training.run import train
from jaxtune.training.run_directory import RunDirectory
from tests.tiny_task import configuration

sys.path.insert(0, str(Path(__file__).parent.parent / "search"))
from synthetic import SyntheticRunner, interrupt_at

SEARCH = (
    "search={trials: 4, promote: 1, initial: 4, space: {optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}, "
    "update.0.rank: {power_of_two: [2, 64]}}}",
    "run_dir=runs/study",
)


@pytest.fixture
def project(tmp_path, tiny_model, rows, monkeypatch):
    """A folder with a model, data and a configuration that names them from there; the working directory is another."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        shutil.copy(rows / f"{split}.jsonl", folder / "data")
    shutil.copytree(tiny_model, folder / "model")
    text = configuration("runs/one", tiny_model, rows).replace(str(tiny_model), "model").replace(str(rows), "data")
    (folder / "my.yaml").write_text(
        "".join(line for line in text.splitlines(keepends=True) if "test.jsonl" not in line)
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def told(capsys, *arguments, code=0):
    """The JSON that a command prints, or the message that it is refused with."""
    capsys.readouterr()
    assert main([*map(str, arguments), *(["--json"] if code == 0 else [])]) == code
    output = capsys.readouterr()
    return json.loads(output.out) if code == 0 else output.err


def test_a_run_that_moved_goes_on_from_any_working_directory(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    asked = iter([False, True])
    assert train(load_config("my.yaml", ["train.steps=4"]), should_stop=lambda: next(asked))["steps"] == 2
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = project.rename(tmp_path / "moved")
    run = there / "runs" / "one"
    summary = told(capsys, "train", run / "config.yaml")
    assert (summary["stopped"], summary["steps"]) == ("finished", 4)
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(there / "model")

    # What is gone is told by its key, and what is not asked for may be gone.
    (there / "data").rename(tmp_path / "data")
    message = told(capsys, "evaluate", run, "--split", "validation", code=2)
    assert f"data.train.path: data/train.jsonl is gone: it is not in {there}" in message
    told(capsys, "export", run, "--peft", "exported")
    # By itself, a run has lost them, unless it is said where they are.
    alone = run.rename(tmp_path / "alone")
    message = told(capsys, "evaluate", alone, "--split", "validation", code=2)
    assert "model.path: there is no directory model" in message
    assert "as paths_from says" in message
    evaluated = told(capsys, "evaluate", alone, "--split", "validation", f"paths_from=[{there}, ..]")
    assert evaluated["metrics"]["loss"] == pytest.approx(summary["metrics"]["validation_loss"], rel=1e-5)


def test_a_study_that_moved_goes_on_and_its_journal_has_no_path_that_nobody_typed(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    config = load_config("my.yaml", SEARCH)
    RunDirectory(config.directory, study=True).claim(config)
    runner = SyntheticRunner(divergence=1.0)
    runner.before = interrupt_at(1, 10)
    assert make_study(config, runner).run() is None
    alone, study = tmp_path / "alone", Path("runs/study")
    shutil.copytree(study, alone)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in (alone, project.rename(tmp_path / "moved") / study):
        again = load_config(place / "config.yaml")
        # Alone, it has its files where they were, and they have moved by the second time.
        folder = project if place == alone else tmp_path / "moved"
        assert again.paths_from[0 if place != alone else -1] == str(folder)
        RunDirectory(again.directory, study=True).check(again)
        assert make_study(again, SyntheticRunner()).run() is not None
        journal = (place / "trials.jsonl").read_text()
        assert str(tmp_path) not in journal
        assert json.loads(journal.splitlines()[0])["config"]["data"]["train"]["path"] == "data/train.jsonl"


def test_a_relative_path_is_meant_from_the_file_and_in_an_override_from_here(project, tmp_path, monkeypatch):
    here, folder = tmp_path / "elsewhere", project / "data"
    config = load_config("../project/my.yaml")
    assert located(config).data.train.path == str(folder / "train.jsonl")
    assert located(config).model.path == str(project / "model")
    assert config.data.train.path == "data/train.jsonl"
    # Where there is nothing beside the file, from here, as ever.
    (here / "only").mkdir()
    (here / "only" / "here.jsonl").write_text("")
    config = load_config("../project/my.yaml", ["data.train=only/here.jsonl"])
    assert config.data.train.path == "only/here.jsonl"
    assert located(config).data.train.path == "only/here.jsonl"
    # Whoever types a path sees what is here, also where the project has a file of that name.
    (here / "data").mkdir()
    (here / "data" / "train.jsonl").write_text("")
    assert located(load_config("../project/my.yaml")).data.train.path == str(folder / "train.jsonl")
    config = load_config("../project/my.yaml", ["data.train=data/train.jsonl"])
    monkeypatch.chdir(here / "only")
    assert located(config).data.train.path == str(here / "data" / "train.jsonl")
    assert located(config).data.validation.path == str(folder / "validation.jsonl")


@pytest.mark.parametrize("override", ["data={train: data/train.jsonl}", "data.train={path: data/train.jsonl}"])
def test_a_path_within_an_overridden_section_is_meant_from_here(project, tmp_path, override):
    here = tmp_path / "elsewhere"
    for part in ("train", "validation"):
        (here / "data").mkdir(exist_ok=True)
        (here / "data" / f"{part}.jsonl").write_text("")
    data = located(load_config("../project/my.yaml", [override])).data
    # Only what was typed here is meant from here.
    assert os.path.abspath(data.train.path) == str(here / "data" / "train.jsonl")
    assert data.validation.path == str(project / "data" / "validation.jsonl")


def test_what_is_checked_before_and_the_searches_of_others_are_found_from_elsewhere(project):
    check_base(load_config("../project/my.yaml"))
    (project / "earlier").mkdir()
    file = project / "my.yaml"
    file.write_text(file.read_text() + "study: {ablation: {search: earlier}}\n")
    with pytest.raises(UserError, match=rf"ablation\.search: {project / 'earlier'} does not hold a finished search"):
        ablation.run(load_config("../project/my.yaml", SEARCH), command="")


def test_absolute_paths_hub_ids_and_the_package_s_own_leave_no_folders(tmp_path, tiny_model, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in (tiny_model, "jaxtune:nano", "some/hub-id"):
        (tmp_path / "a.yaml").write_text(configuration("runs/a", model, rows))
        config = load_config("a.yaml")
        assert config.paths_from == []
        assert located(config) == config
    # An id that names a folder here is that folder.
    (tmp_path / "some" / "hub-id").mkdir(parents=True)
    assert located(load_config("a.yaml")).model.path == "some/hub-id"
    assert load_config("a.yaml").paths_from == [str(tmp_path)]


def test_a_model_that_is_gone_is_named_by_its_key(config_file, tmp_path, tiny_model):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = load_config(config_file, [f"model.path={copy}", "train.steps=2"])
    asked = iter([True])
    train(config, should_stop=lambda: next(asked))
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=rf"model\.path: {copy} is gone; put it, or a link to it, back there"):
        train(load_config(tmp_path / "run" / "config.yaml"))
