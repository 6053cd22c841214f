"""One way of the makespan benchmark, in a process of its own: the study by jaxtune, or by the peer."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from makespan_parts import Parts, step_seconds
from train_step import process_peak

WAYS = ("population", "single", "peer", "peer_at_fraction")


def alone(way: str, folder: Path, started: float) -> dict[str, Any]:
    """Runs one way and returns its events, each with the seconds since the process was started."""
    events: list[dict[str, Any]] = []

    def tell(trial: int, event: str, step: int, score: float | None) -> None:
        seconds = time.time() - started
        score = score if score is not None and math.isfinite(score) else None
        events.append({"seconds": seconds, "trial": trial, "event": event, "step": step, "score": score})

    parts = Parts(started)
    if way.startswith("peer"):
        from makespan_peer import Peer, peak_device_memory

        peer = Peer(folder)
        if way == "peer_untuned":
            return {"untuned_loss": peer.untuned()}
        (peer.pruned if way == "peer" else peer.at_fraction)(tell)
        found, on_device = {"steps_run": peer.steps_run, "compile_seconds": None, "mfu": None}, peak_device_memory()
    else:
        from jaxtune.parallel.platform import device_memory_peak

        found = jaxtune_study(folder, tell, population=way == "population")
        on_device = device_memory_peak()
    taken = parts.stop()
    seconds = time.time() - started
    used = os.times()
    return {
        **found,
        "seconds": seconds,
        "parts": taken,
        "step_seconds": step_seconds(taken, found["steps_run"]),
        # Of all cores: what other processes take from the machine does not count.
        "cpu_seconds": used.user + used.system,
        "events": events,
        "peak_bytes": on_device or process_peak(),
    }


def jaxtune_study(folder: Path, tell: Any, *, population: bool) -> dict[str, Any]:
    """The study by jaxtune, as ``jaxtune search`` runs it."""
    import jax

    from jaxtune.cli.common import start_devices
    from jaxtune.config import load_config
    from jaxtune.search.run import search

    compiling = 0.0

    def measured(name: str, seconds: float, **_: Any) -> None:
        nonlocal compiling
        compiling += seconds if name == "/jax/core/compile/backend_compile_duration" else 0.0

    def on_event(event: str, trial: int | None, details: Mapping[str, Any]) -> None:
        if trial is not None and event in ("scored", "finished", "failed"):
            score = details["score"]
            # Lower is better in every figure: of answers, the share that is wrong.
            tell(trial, event, details["step"], score if lower or score is None else 1 - score)

    jax.monitoring.register_event_duration_secs_listener(measured)
    start_devices()
    config = load_config(folder / "config.yaml", [] if population else ["search.population=1"])
    assert config.search is not None
    lower = config.search.objective == "loss"
    summary = search(config, on_event=on_event)
    assert summary is not None
    return {
        "steps_run": summary["budget"]["steps_run"],
        "compile_seconds": compiling,
        "mfu": _mfu(Path(config.directory)),
    }


def _mfu(run: Path) -> float | None:
    """The median MFU of the logged steps of all trials; None where the device's peak is not known."""
    records = [json.loads(line) for file in run.glob("**/metrics.jsonl") for line in file.read_text().splitlines()]
    shares = [record["mfu"] for record in records if "mfu" in record]
    return statistics.median(shares) if shares else None
