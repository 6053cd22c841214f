"""Stopping a study from another process: the right process is asked, and waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from jaxtune.errors import UserError
from jaxtune.files import has_open, lock_holder
from jaxtune.search.journal import Journal
from jaxtune.search.stopping import stop_study

# Ends half a second after it was asked to, as one that saves first.
HELD = """
import signal, sys, time
from jaxtune.search.journal import Journal
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with Journal(sys.argv[1]) as journal:
    print("held", flush=True)
    while not asked or "deaf" in sys.argv:
        time.sleep(0.05)
    time.sleep(0.5)
    journal.append("saved")
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the study, and ends it for good after the test."""
    started = []

    def run(*options):
        process = subprocess.Popen(
            [sys.executable, "-c", HELD, str(tmp_path), *options], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_the_holder_is_asked_and_waited_for(hold, tmp_path):
    process = hold()
    asked = []
    holder, stopped = stop_study(tmp_path, timeout=60, on_asked=asked.append)
    assert stopped
    assert holder is not None
    assert asked == [holder]
    assert (holder.process, holder.host) == (process.pid, socket.gethostname())
    assert holder.started is not None
    assert abs(time.time() - holder.started) < 600
    assert process.wait(timeout=60) == 0
    assert '"saved"' in (tmp_path / "trials.jsonl").read_text()
    assert stop_study(tmp_path, timeout=1) == (None, True)


def test_one_that_does_not_end_is_told_of(hold, tmp_path):
    process = hold("deaf")
    holder, stopped = stop_study(tmp_path, timeout=0.3)
    assert holder is not None
    assert not stopped
    assert process.poll() is None


def test_a_stranger_is_left_alone(tmp_path):
    """The lock's text names a process that does not hold it, or one of another machine."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock = tmp_path / "study.lock"
    try:
        with Journal(tmp_path):
            own = lock.read_text()
            lock.write_text(own.replace(f"process {os.getpid()}", f"process {bystander.pid}"))
            with pytest.raises(UserError, match="that process does not hold it"):
                stop_study(tmp_path, timeout=1)
            lock.write_text(own.replace(f"on {socket.gethostname()}", "on elsewhere"))
            with pytest.raises(UserError, match=r"run by process \d+ on elsewhere, .*; stop it there: jaxtune"):
                stop_study(tmp_path, timeout=1)
            lock.write_text("")
            with pytest.raises(UserError, match="does not tell which process holds it"):
                stop_study(tmp_path, timeout=1)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_who_has_a_file_open(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.touch()
    assert has_open(os.getpid(), path) is False
    with path.open():
        assert has_open(os.getpid(), path) is True
    assert lock_holder(tmp_path / "none.lock") is None


def test_there_must_be_a_study(tmp_path):
    with pytest.raises(UserError, match="no study here"):
        stop_study(tmp_path, timeout=1)
