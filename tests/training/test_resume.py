"""Killed and started again, a run ends as one that was never killed."""

import random
import signal
import time

import pytest

from jaxtune.telemetry.writers import read_metrics
from tests.tiny_task import command, finish

DROPOUT = ("update.0.dropout=0.1", "optimizer.learning_rate=1e-2", "train.steps=40", "train.checkpoint_every=3")


def wait_for_step(process, path, step):
    """Waits until a step is logged; whether the process still ran then."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if path.exists() and any(record["step"] >= step for record in read_metrics(path)):
            return True
        time.sleep(0.002)
    raise TimeoutError(f"step {step} was never logged")


def record(run_dir):
    return [
        {name: value for name, value in line.items() if not name.endswith("_per_second")}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_kill_9_loses_nothing(config_file, tmp_path):
    finish(command("train", config_file, *DROPOUT, f"run_dir={tmp_path / 'whole'}"))
    run_dir, kills = tmp_path / "killed", 0
    draw = random.Random(0)
    for step in (draw.randrange(2, 12), draw.randrange(13, 30)):
        process = command("train", config_file, *DROPOUT, f"run_dir={run_dir}")
        if wait_for_step(process, run_dir / "metrics.jsonl", step):
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    finish(command("train", config_file, *DROPOUT, f"run_dir={run_dir}"))
    assert kills, "no run was killed before its end: make the runs longer"
    # Every step once, and bit for bit the same numbers: losses, norms, evaluations.
    assert record(run_dir) == record(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(config_file, tmp_path):
    longer = ("train.steps=2000", "data.validation=null")
    process = command("train", config_file, *longer)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert wait_for_step(process, metrics, 5)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "signal" in output
    stopped = max(line["step"] for line in read_metrics(metrics))
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()
    assert not (tmp_path / "run" / "summary.json").exists()
