"""Several processes: start-up, and what only one of them does."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import jax

from jaxtune.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TIMEOUT = "JAXTUNE_DISTRIBUTED_TIMEOUT"
_DEFAULT_SECONDS, _PAUSE_SECONDS = 60, 0.2


def start() -> None:
    """Joins the other processes of a run, where there are any; call it before anything touches a device.

    On a TPU slice, Slurm or Kubernetes jax finds the others by itself when ``JAXTUNE_DISTRIBUTED=auto`` is set.
    Elsewhere three variables say it: ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``. They are waited for ``JAXTUNE_DISTRIBUTED_TIMEOUT`` seconds (60). Without them this does
    nothing.

    Where not all processes come, this process ends with exit code 2: what waits for them cannot be interrupted.

    Raises:
      UserError: only some of the three variables are set, a number is none, or process 0 does not answer; or there is
        no cluster that jax knows.
    """
    if os.environ.get("JAXTUNE_DISTRIBUTED") == "auto":
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"JAXTUNE_DISTRIBUTED=auto: jax does not find the other processes ({_line(error)}); set "
                f"{', '.join(_VARIABLES)} instead"
            ) from error
        return
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if not given:
        return
    if len(given) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in given)
        raise UserError(
            f"{given[0]} is set, but {missing} is not: several processes need all of {', '.join(_VARIABLES)}"
        )
    try:
        count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    except ValueError as error:
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID are whole numbers ({error})") from error
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID {index} is not below JAX_NUM_PROCESSES {count}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _join(os.environ["JAX_COORDINATOR_ADDRESS"], count, index, _seconds())


def _seconds() -> int:
    given = os.environ.get(_TIMEOUT) or str(_DEFAULT_SECONDS)
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"{_TIMEOUT}: {given!r} is no whole number of seconds")
    return int(given)


def _join(address: str, count: int, index: int, seconds: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS: {address!r} is no host:port of process 0")
    if index:
        _await_coordinator(host.strip("[]"), int(port), seconds)
    # Past its own limit jax ends the process with a stack trace.
    watch = threading.Timer(
        seconds,
        _give_up,
        [
            f"not all of the {count} processes have joined at {address} within {seconds} s; start each with the same "
            f"JAX_COORDINATOR_ADDRESS and a JAX_PROCESS_ID of its own, or wait longer with {_TIMEOUT}=SECONDS"
        ],
    )
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=2 * seconds + 60)
    except RuntimeError as error:
        raise UserError(f"JAX_COORDINATOR_ADDRESS: {address}: {_line(error)}") from error
    finally:
        watch.cancel()


def _await_coordinator(host: str, port: int, seconds: float) -> None:
    """Waits until something answers at process 0's address.

    Raises:
      UserError: nothing does in that time.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), _PAUSE_SECONDS)).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS: nothing answers at {host}:{port} within {seconds:g} s ({_line(error)}); "
                    f"start the process with JAX_PROCESS_ID=0 there, or wait longer with {_TIMEOUT}=SECONDS"
                ) from error
        time.sleep(_PAUSE_SECONDS)


def _give_up(message: str) -> None:
    print(f"jaxtune: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_writer() -> bool:
    """Whether this process writes the files that a run has once (metrics, summary)."""
    return jax.process_index() == 0
