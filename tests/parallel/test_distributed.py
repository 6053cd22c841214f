"""What the variables of a run of several processes may say. (Two processes train in the tests of training.)"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.parallel import distributed

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def started(monkeypatch):
    """Starts with some variables and returns the calls of ``jax.distributed.initialize``."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(distributed, "_await_coordinator", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *arguments: calls.append(arguments))
    for name in (*NAMES, "JAXTUNE_DISTRIBUTED", "JAXTUNE_DISTRIBUTED_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)

    def start(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        distributed.start()
        return calls

    return start


def test_without_variables_nothing_happens(started):
    assert started() == []
    assert started(JAX_COORDINATOR_ADDRESS="", JAX_NUM_PROCESSES="", JAX_PROCESS_ID="") == []


def test_three_variables_join_the_processes(started):
    assert started(JAX_COORDINATOR_ADDRESS="host:123", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3") == [
        ("jax_cpu_collectives_implementation", "gloo"),
        ("host", 123, 60),
        ("host:123", 4, 3),
    ]


@pytest.fixture
def free_port():
    """A port that nothing listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_coordinator_that_is_not_there_is_one_message(free_port):
    with pytest.raises(UserError, match=f"nothing answers at 127.0.0.1:{free_port} within 0.3 s .*JAX_PROCESS_ID=0"):
        distributed._await_coordinator("127.0.0.1", free_port, 0.3)
    with socket.create_server(("127.0.0.1", free_port)):
        distributed._await_coordinator("127.0.0.1", free_port, 0.3)


def test_processes_that_do_not_come_are_one_message(free_port):
    """jax would end the process with a stack trace of its own."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXTUNE_DISTRIBUTED_TIMEOUT": "1"}
    variables |= dict(zip(NAMES, (f"127.0.0.1:{free_port}", "2", "0"), strict=True))
    program = "from jaxtune.parallel.distributed import start; start()"
    ended = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (2, "")
    (said,) = ended.stderr.splitlines()
    assert said.startswith(f"jaxtune: not all of the 2 processes have joined at 127.0.0.1:{free_port} within 1 s")


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:port"])
def test_an_address_without_a_port(started, address):
    with pytest.raises(UserError, match="is no host:port"):
        started(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")


def test_a_timeout_that_is_none(started):
    with pytest.raises(UserError, match="JAXTUNE_DISTRIBUTED_TIMEOUT: 'soon'"):
        started(
            JAX_COORDINATOR_ADDRESS="host:1",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID="0",
            JAXTUNE_DISTRIBUTED_TIMEOUT="soon",
        )


@pytest.mark.parametrize(("name", "value"), [("JAXTUNE_DISTRIBUTED", "auto"), ("JAX_PROCESS_ID", "0")])
def test_what_jax_refuses_is_one_message(started, monkeypatch, name, value):
    def refuse(*_, **__):
        raise RuntimeError("it will not\nfor reasons")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    variables = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    with pytest.raises(UserError, match="it will not") as error:
        started(**{**variables, name: value})
    assert "\n" not in str(error.value)


def test_auto_leaves_it_to_jax(started):
    assert started(JAXTUNE_DISTRIBUTED="auto") == [()]


@pytest.mark.parametrize("given", [NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[:2], NAMES[1:], (NAMES[0], NAMES[2])])
def test_some_of_the_variables_are_not_enough(started, given):
    with pytest.raises(UserError) as error:
        started(**dict.fromkeys(given, "1"))
    said, missing = str(error.value).split(": several")[0].split(", but ")
    assert said.startswith(given[0])
    assert missing == f"{', '.join(name for name in NAMES if name not in given)} is not"


@pytest.mark.parametrize(
    ("count", "index", "part"),
    [
        ("two", "0", "whole numbers"),
        ("2", "0.5", "whole numbers"),
        ("2", "2", "2 is not below JAX_NUM_PROCESSES 2"),
        ("2", "-1", "-1 is not below"),
        ("0", "0", "0 is not below"),
    ],
)
def test_wrong_numbers(started, count, index, part):
    with pytest.raises(UserError, match=part):
        started(JAX_COORDINATOR_ADDRESS="host:123", JAX_NUM_PROCESSES=count, JAX_PROCESS_ID=index)


def test_the_first_process_writes(monkeypatch):
    assert distributed.is_writer()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert not distributed.is_writer()
