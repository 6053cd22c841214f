"""Ray: started on this machine, or joined where it runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtune.errors import UserError

# What passes through it is a trial's values and a score; Ray takes a third of the memory unless told otherwise.
_OBJECT_STORE_BYTES = 80 * 2**20


def start_ray(address: str | None, workers: int) -> tuple[Any, bool]:
    """Joins the Ray that runs at an address, or starts one that only this machine can reach.

    Usage statistics stay off, there is no dashboard, and nothing of the workers' output comes to this process.

    Args:
      address: ``host:port`` of the head node, or ``"auto"``; None starts Ray here.
      workers: how many processes are to fit where Ray is started here.

    Returns:
      The package, and whether Ray was started or joined here, and so is to be left again.

    Raises:
      UserError: nothing answers at the address, or this machine is not a node of that cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # Named after the systems where it is off by default; off, all of Ray's servers listen on the loopback address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return ray, False
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _signals_kept():
        if address is None:
            ray.init(
                "local",
                num_cpus=max(workers, os.cpu_count() or 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                # Trials train with this process' priority; Ray would put them behind everything else.
                _system_config={"worker_niceness": 0},
                **common,
            )
            return ray, True
        _check_reachable(address, ray)
        try:
            ray.init(address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            advice = f"this machine has to be a node of it: ray start --address={address}"
            if "AuthenticationError" in f"{error}{error.__cause__}":
                advice = "it asks for a token: set RAY_AUTH_MODE=token, with the head node's token on this machine"
            raise UserError(
                f"search.ray_address: cannot join Ray at {address} ({str(error).splitlines()[0]}); {advice}"
            ) from error
    return ray, True


def _check_reachable(address: str, ray: Any) -> None:
    """Whether something answers; Ray itself would try for a quarter of an hour.

    Raises:
      UserError: nothing does.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    # A head node listens at its address in the network, which Ray takes for "localhost" as well.
    names = [host, ray.util.get_node_ip_address()] if host in ("localhost", "127.0.0.1") else [host]
    failure = None
    for name in names:
        try:
            socket.create_connection((name, int(port)), timeout=10).close()
        except OSError as error:
            failure = failure or error
        else:
            return
    raise UserError(
        f"search.ray_address: nothing answers at {address} ({failure}); start Ray on the head node with: "
        f"ray start --head --port={port}"
    )


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Puts this process' own handler of ``SIGTERM`` back, which Ray replaces by one that exits without saving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def worker_resources(asked: Mapping[str, float], ray: Any) -> dict[str, float]:
    """What one worker takes: what was asked for, or else one GPU where there is any, or else one CPU core."""
    if asked:
        return dict(asked)
    return {"GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}


def places(resources: Mapping[str, float], ray: Any) -> int:
    """How many workers the cluster's nodes hold, as they are now.

    Raises:
      UserError: not one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = sum(int(min(node.get(name, 0.0) / amount for name, amount in resources.items())) for node in nodes)
    if count == 0:
        wanted = ", ".join(f"{name}: {amount:g}" for name, amount in resources.items())
        kinds = sorted({name for node in nodes for name in node if ":" not in name and "memory" not in name})
        there = "; ".join(", ".join(f"{kind}: {node.get(kind, 0):g}" for kind in kinds) for node in nodes)
        raise UserError(
            f"search.worker_resources: no node of the Ray cluster has {{{wanted}}} (by node: {there}); ask for less"
        )
    return count


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Resources as Ray's actors take them: it has words of its own for two of them."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": others}
