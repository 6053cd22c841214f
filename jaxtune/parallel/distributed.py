"""Several processes: start-up, and what only one of them does."""

from __future__ import annotations

import os

import jax

from jaxtune.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Joins the other processes of a run, where there are any; call it before anything touches a device.

    On a TPU slice, Slurm or Kubernetes jax finds the others by itself when ``JAXTUNE_DISTRIBUTED=auto`` is set.
    Elsewhere three variables say it: ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``. Without them this does nothing.

    Raises:
      UserError: only some of the three variables are set, or a number is none.
    """
    if os.environ.get("JAXTUNE_DISTRIBUTED") == "auto":
        jax.distributed.initialize()
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
    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index)


def is_writer() -> bool:
    """Whether this process writes the files that a run has once (metrics, summary)."""
    return jax.process_index() == 0
