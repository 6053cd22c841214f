"""What the variables of a run of several processes may say. (Two processes train in the tests of training.)"""

from __future__ import annotations

import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.parallel import distributed

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def started(monkeypatch):
    """Starts with some variables and returns the calls of ``jax.distributed.initialize``."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *arguments: calls.append(arguments))
    for name in (*NAMES, "JAXTUNE_DISTRIBUTED"):
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
        ("host:123", 4, 3),
    ]


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
