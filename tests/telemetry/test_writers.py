import contextlib
import importlib.machinery
import importlib.util
import json
import resource
import sys
import threading
import types
from unittest import mock

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxtune.errors import UserError
from jaxtune.telemetry.writers import (
    JsonlWriter,
    TensorBoardWriter,
    WandbWriter,
    Writers,
    check_wandb,
    read_metrics,
)


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


def events(directory):
    """What TensorBoard reads: of each file ``(step, tag, value)``, or ``(step, "start")`` from where on it forgets."""
    found = []
    for file in sorted(directory.iterdir()):
        assert "tfevents" in file.name
        data = file.read_bytes()
        while data:
            # A record of TensorFlow's: length, its checksum, the bytes, their checksum.
            length = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log"):
                found.append((event.step, "start"))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_s_files_hold_every_scalar_and_where_a_run_went_back_to(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"loss": 0.5, "norm": 2.0})
    writer.cut_back(0)
    writer.write(1, {"loss": 0.25})
    writer.close()
    assert events(tmp_path) == [(1, "loss", 0.5), (1, "norm", 2.0), (1, "start"), (1, "loss", 0.25)]
    TensorBoardWriter(tmp_path / "later", resume_at=7).close()
    assert events(tmp_path / "later") == [(8, "start")]


@pytest.fixture
def full_disk():
    """Makes it that no file can grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def full(room):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full


class _Closed:
    """A writer that counts how often it is closed (no mock: a protocol is looked for in the class itself)."""

    def __init__(self):
        self.times = 0

    def write(self, step, metrics):
        pass

    def close(self):
        self.times += 1


@pytest.mark.parametrize("kind", [lambda folder: JsonlWriter(folder / "metrics.jsonl"), TensorBoardWriter])
def test_a_full_disk_is_told_by_the_call_that_writes_and_names_the_place(tmp_path, full_disk, kind):
    threads = threading.active_count()
    broken, closed = kind(tmp_path), _Closed()
    writers = Writers([broken, closed])
    with full_disk(300):
        with pytest.raises(OSError, match="too large") as raised:
            writers.write(1, {f"loss {index}": 0.5 for index in range(1000)})
        assert raised.value.filename.startswith(str(tmp_path))
        # It may find that there still is no room.
        with contextlib.suppress(OSError):
            writers.close()
    assert closed.times == 1
    # None that would tell of the same error, or wait, when the process ends.
    assert threading.active_count() == threads


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
