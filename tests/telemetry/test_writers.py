import importlib.machinery
import importlib.util
import json
import sys
import types
from unittest import mock

import pytest

from jaxtune.errors import UserError
from jaxtune.telemetry.writers import JsonlWriter, TensorBoardWriter, WandbWriter, check_wandb, read_metrics


def test_each_line_is_json_even_for_numbers_that_are_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": float("nan")})
    # Flushed line by line: a reader need not wait for the end.
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
    ]
    writer.close()


def test_resuming_cuts_back_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a crash
    writer = JsonlWriter(path, resume_at=2)
    writer.write(3, {"loss": 33.0})
    writer.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 33.0)]


def test_tensorboard_writes_event_files(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert any("tfevents" in file.name for file in tmp_path.iterdir())


def test_weights_and_biases_is_looked_for_before_a_run(monkeypatch):
    check_wandb(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"telemetry\.wandb: .*jaxtune\[wandb\]"):
        check_wandb("project")


def test_weights_and_biases_without_a_login_is_told(monkeypatch):
    class Refused(Exception):
        pass

    def refuse(**_):
        raise Refused("No API key\nconfigured")

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    vars(module).update(Error=Refused, init=refuse)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"telemetry\.wandb: No API key configured"):
        WandbWriter("project", "run", ".", {})


def test_wandb_runs_are_told_apart_by_their_directories(monkeypatch, tmp_path):
    wandb = mock.Mock(__spec__=importlib.machinery.ModuleSpec("wandb", None), Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for directory in ("one", "two", "one"):
        writer = WandbWriter("project", "run", tmp_path / directory, {"seed": 1})
    writer.write(3, {"loss": 0.5})
    writer.close()
    first, second, again = (call.kwargs for call in wandb.init.call_args_list)
    assert first == again
    assert first["id"] != second["id"]
    assert first["resume"] == "allow"
    wandb.init.return_value.log.assert_called_once_with({"loss": 0.5}, step=3)
    wandb.init.return_value.finish.assert_called_once_with()
