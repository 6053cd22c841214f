"""Where the files of runs, studies and trials lie."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import jaxtune
from jaxtune import layout
from jaxtune.layout import RunFiles, TrialDirectory

PACKAGE = Path(jaxtune.__file__).parent


def paths_of(directory: RunFiles) -> dict[str, Path]:
    """The paths of a directory by the names of their properties."""
    names = [name for name in dir(RunFiles) if name.endswith("_path") and isinstance(getattr(RunFiles, name), property)]
    return {name: path for name in names if (path := getattr(directory, name)) is not None}


def spelled(source: str, names: set[str]) -> Iterator[tuple[int, str]]:
    """Lines that spell a file's name: whole, or within a path; a folder's, where it is joined to one."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if not any(map(str.isspace, text)):
                found = names & set(text.split("/"))
                joined = {name for name in found if "." in name or text != name}
            case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str(text))):
                joined = names & {text}
            case _:
                continue
        for name in joined:
            yield node.lineno, name


def test_the_names_on_disk_are_what_other_programs_read(tmp_path):
    directory = RunFiles(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in paths_of(directory).values()} == {
        *("config.yaml", "metrics.jsonl", "checkpoints", "adapter", "model", "tensorboard", "profile", "summary.json"),
        *("trials.jsonl", "report.html", "data.json", "run.lock", "study.lock", "workers", "search"),
    }
    assert directory.trial(7).path == tmp_path / "trials" / "007"
    assert directory.trial(1234).checkpoints_path == tmp_path / "trials" / "1234" / "checkpoints"
    assert directory.trial_lock_path(directory.trial(7)) == tmp_path / "workers" / "007.lock"
    assert directory.worker_log_path(2) == tmp_path / "workers" / "2.log"


def test_no_other_module_spells_a_name():
    names = {path.name for path in paths_of(RunFiles("run")).values()} | {"trials"}
    files = [file for file in PACKAGE.rglob("*.py") if file != Path(layout.__file__)]
    found = [
        f"{file.relative_to(PACKAGE)}:{line}: {name}"
        for file in files
        for line, name in spelled(file.read_text(encoding="utf-8"), names)
    ]
    assert not found, "\n".join(found)
    # It does see what it is to see.
    assert dict(spelled('x = "config.yaml"\ny = p / "trials"\nz = "trials/*"\nq = {"trials": 1}', names)) == {
        1: "config.yaml",
        2: "trials",
        3: "trials",
    }


def test_a_trials_directory_knows_its_study(tmp_path, monkeypatch):
    study = RunFiles(tmp_path / "runs" / "study")
    trial = study.trial(3)
    trial.path.mkdir(parents=True)
    assert trial.study_path is None, "there is no journal"
    study.journal_path.touch()
    assert (trial.study_path, trial.number) == (study.path, 3)
    monkeypatch.chdir(tmp_path)
    assert TrialDirectory("runs/study/trials/003").study_path == Path("runs/study")
    monkeypatch.chdir(trial.path.parent)
    assert TrialDirectory("003").study_path == study.path
    aside = TrialDirectory(trial.path.with_name("003.1"))
    assert (aside.study_path, aside.number) == (study.path, None)
    assert TrialDirectory(study.path).study_path is None
    assert TrialDirectory(os.fspath(study.checkpoints_path / "003")).study_path is None


def test_what_has_begun_left_a_trace(tmp_path):
    for name in ("run.lock", "metrics.jsonl", "study.lock", "trials.jsonl"):
        directory = RunFiles(tmp_path / name)
        directory.checkpoints_path.mkdir(parents=True)
        directory.config_path.touch()
        assert not directory.has_begun
        (directory.path / name).touch()
        assert directory.has_begun
