"""A disk that is full, or can only be read: one message, and the same command goes on once there is room."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource

import pytest

from jaxtune import cli
from jaxtune.cli import main
from jaxtune.config import dump_config, load_config

SEARCH = "search={trials: 3, promote: 1, space: {optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}}}"


@contextlib.contextmanager
def room(size):
    """No file grows beyond so many bytes: the nearest thing to a full disk that needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def refused(capsys):
    """Runs a command for which there is no room, and returns the last line of what it says."""

    def run(*arguments, size):
        with room(size):
            code = main(list(map(str, arguments)))
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        told = [line for line in said.err.splitlines() if line.startswith("jaxtune: ")]
        assert told == said.err.splitlines()[-1:]
        assert told[0].endswith("; what is written stays, and the same command goes on once there is room")
        return told[0]

    return run


def test_a_command_without_room_says_so_and_goes_on_with_it(refused, config_file, tmp_path, capsys):
    run, overrides = tmp_path / "run", ("train.steps=4", "train.checkpoint_every=2", "data.test=null")
    train = ("train", config_file, *overrides, "data.validation=null")
    written = len(dump_config(load_config(config_file, overrides)))
    assert refused(*train, size=written + 200).startswith(f"jaxtune: {run / 'checkpoints'}: ")
    assert main(list(map(str, train))) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["examples_per_step"], summary["compilations"]) == (4, 8, 1)

    capsys.readouterr()
    merged = tmp_path / "merged"
    # The tokenizer is written to another place before, to be looked at.
    said = refused("export", run, "--merged", merged, size=10_000)
    assert said.startswith(f"jaxtune: {merged / 'model.safetensors'}: ")
    assert not merged.exists()

    search = ("search", config_file, SEARCH, "data.test=null", f"run_dir={tmp_path / 'study'}")
    assert refused(*search, size=500).startswith(f"jaxtune: {tmp_path / 'study' / 'config.yaml'}: ")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
def test_a_place_where_no_file_can_be_made_is_refused_before_anything_is_opened(config_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for command in (
        ("train", config_file, "run_dir=/proc/run"),
        ("search", config_file, SEARCH, "run_dir=/proc/run"),
        ("export", config_file, "--merged", "/proc/model"),
    ):
        assert main(list(map(str, command))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be written: no file can be made in /proc" in line


@pytest.mark.parametrize(
    ("number", "code", "ends"),
    [
        (errno.ENOSPC, 2, "once there is room"),
        (errno.EDQUOT, 2, "once there is room"),
        (errno.EROFS, 2, "Read-only file system"),
        (errno.EACCES, 2, "Permission denied"),
        (errno.EIO, 1, "Input/output error"),
    ],
)
def test_an_error_of_the_system_is_one_line_that_names_the_file(monkeypatch, capsys, number, code, ends):
    def fail(given):
        raise OSError(number, os.strerror(number), "/mnt/run/config.yaml")

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["train"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxtune: /mnt/run/config.yaml: ")
    assert line.endswith(ends)
