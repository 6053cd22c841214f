"""Studies over real Ray workers on this machine, one of them killed in the middle of its trials."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from jaxtune.config import load_config
from jaxtune.errors import UserError
from jaxtune.search.distributed import check_distributed
from jaxtune.search.run import search
from tests.tiny_task import configuration, rows, tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no wheel for this Python")

__all__ = ["rows", "tiny_model"]

EVERY = 4
SEARCH = (
    "{trials: 5, promote: 2, initial: 5, fraction: 0.5, population: 2, reference: {optimizer.learning_rate: 2e-2}, "
    "space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-1]}}}"
)


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, for all tests of this file."""
    from jaxtune.search.distributed.cluster import start_ray

    package, own = start_ray(None, 2)
    assert own
    yield package
    package.shutdown()


@pytest.fixture(scope="module")
def config_of(tiny_model, rows, tmp_path_factory):
    """Makes the configuration of the study, in a directory of its own."""

    def make(*overrides: str):
        directory = tmp_path_factory.mktemp("study")
        file = directory / "study.yaml"
        file.write_text(configuration(directory / "run", tiny_model, rows))
        common = [f"search={SEARCH}", "train.steps=80", f"train.checkpoint_every={EVERY}"]
        return load_config(file, [*common, *overrides])

    return make


@pytest.fixture(scope="module")
def alone(config_of):
    """The same study in this process: its journal and its summary."""
    config = config_of()
    summary = search(config)
    return scores(config), summary


def scores(config) -> dict[tuple[str, int], tuple[dict, float]]:
    """Every score of a journal, by phase and trial, with the trial's values."""
    lines = (Path(config.directory) / "trials.jsonl").read_text().splitlines()
    return {
        (record["event"], record["trial"]): (record["configuration"], record["score"])
        for record in map(json.loads, lines)
        if record["event"] in ("scored", "finished", "tested")
    }


def logged(config, trial: int) -> list[int]:
    """The steps of a trial that workers trained, those that were trained twice included.

    Workers append to their logs and nothing is ever cut off there; the trial's own metrics hold each step once.
    """
    steps: list[str] = []
    for log in (Path(config.directory) / "workers").glob("*.log"):
        steps += re.findall(rf"^trial {trial}  step (\d+)/\d+  loss ", log.read_text(), flags=re.MULTILINE)
    return [int(step) for step in steps]


@pytest.mark.slow
def test_two_workers_score_the_same_trials(ray, config_of, alone):
    config = config_of("search.workers=2")
    summary = search(config)
    assert summary is not None
    # The same program on the same kind of device: not a bit differs, however the trials share the workers.
    assert scores(config) == alone[0]
    assert summary["best"]["trial"] == alone[1]["best"]["trial"]
    for number in range(5):
        assert max(Counter(logged(config, number)).values()) == 1
    both = [log.read_text() for log in (Path(config.directory) / "workers").glob("*.log")]
    assert len(both) == 2
    assert all("  validation loss " in log for log in both), "both workers trained"


class Killer(threading.Thread):
    """Kills the worker of the first trial that has a checkpoint, and keeps what stood on disk then."""

    def __init__(self, run_dir: Path):
        super().__init__(daemon=True)
        self.run_dir = run_dir
        self.checkpoints: dict[int, int] = {}

    def run(self) -> None:
        from jaxtune.training.checkpoints import Checkpoints

        while not (self.run_dir / "summary.json").exists():
            time.sleep(0.01)
            for log in (self.run_dir / "workers").glob("*.log"):
                text = log.read_text()
                mine = {int(number) for number in re.findall(r"^trial (\d+)  step", text, flags=re.MULTILINE)}
                if not any(Checkpoints.newest_on_disk(self._trial(number) / "checkpoints") for number in mine):
                    continue
                os.kill(int(re.findall(r"process (\d+) on", text)[-1]), signal.SIGKILL)
                time.sleep(0.3)
                self.checkpoints = {
                    number: Checkpoints.newest_on_disk(self._trial(number) / "checkpoints") for number in mine
                }
                return

    def _trial(self, number: int) -> Path:
        return self.run_dir / "trials" / f"{number:03d}"


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(ray, config_of, alone):
    config = config_of("search.workers=2")
    killer = Killer(Path(config.directory))
    killer.start()
    assert search(config) is not None
    killer.join(timeout=60)
    assert killer.checkpoints, "a worker was killed in the middle of its trials"
    assert scores(config) == alone[0]
    again = 0
    for number in range(5):
        steps = logged(config, number)
        twice = sorted(step for step, count in Counter(steps).items() if count > 1)
        assert set(steps) >= set(range(1, 41)), "every step was trained"
        assert max(Counter(steps).values()) <= 2
        assert not twice or twice[0] == killer.checkpoints[number] + 1
        # A checkpoint takes a while to reach the disk: the worker may be under way to the next one.
        assert len(twice) <= 2 * EVERY
        again += len(twice)
    assert len(killer.checkpoints) == 2, "the worker held two trials"
    print(f"trained again after the kill: {again} steps")


def test_a_machine_without_the_drivers_files_is_refused(tmp_path, monkeypatch):
    from jaxtune.search.distributed.worker import Site, Worker, versions

    monkeypatch.chdir(tmp_path)
    probe = tmp_path / "probe"
    site = Site(str(tmp_path), tmp_path, probe, "token", versions())
    worker = Worker(0)
    with pytest.raises(UserError, match=r"run_dir: .* does not see what the driver writes to .*shared file system"):
        worker.open({}, site)
    probe.write_text("another study's")
    with pytest.raises(UserError, match="does not see what the driver writes"):
        worker.open({}, site)
    with pytest.raises(UserError, match=r"has no /nowhere, where the driver runs"):
        worker.open({}, Site("/nowhere", tmp_path, probe, "token", versions()))
    with pytest.raises(UserError, match=r"has jax .*, the driver 0.0.1; install the same"):
        worker.open({}, Site(str(tmp_path), tmp_path, probe, "token", {**versions(), "jax": "0.0.1"}))


def test_what_cannot_be_had_is_told_before_anything_opens(ray, config_of):
    with pytest.raises(UserError, match=r"search.worker_resources: no node of the Ray cluster has \{GPU: 1\}"):
        search(config_of("search.workers=2", "search.worker_resources={GPU: 1}"))
    with pytest.raises(UserError, match=r"ray_address is host:port or auto, not ray://head"):
        config_of("search.ray_address=ray://head:10001")


def test_an_address_where_nothing_answers(monkeypatch, ray):
    from jaxtune.search.distributed.cluster import start_ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"search.ray_address: nothing answers at 127.0.0.1:9 .*ray start --head"):
        start_ray("127.0.0.1:9", 2)


def test_a_missing_package_is_named(config_of, monkeypatch):
    search_section = config_of("search.workers=2").search
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxtune\[distributed\]'"):
        check_distributed(search_section)
    check_distributed(config_of().search)


def test_several_drivers_are_refused(config_of, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="one driver"):
        check_distributed(config_of("search.workers=2").search)
