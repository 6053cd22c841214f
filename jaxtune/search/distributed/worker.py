"""The worker: a process that opens the study's configuration once and trains trials that the driver sends."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxtune.config import Config
from jaxtune.errors import UserError
from jaxtune.files import acquire_lock
from jaxtune.layout import RunFiles
from jaxtune.parallel.platform import enable_compilation_cache, leave_out_absent_accelerators, platform
from jaxtune.search.checks import checked_runner
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.search.trial import Trial
from jaxtune.telemetry.progress import ProgressDisplay
from jaxtune.training.hooks import Hooks

_LOCK_SECONDS = 180.0
"""How long a trial's files may stay in use by a worker that is gone: a file server's lease, with room."""


@dataclass(frozen=True)
class Site:
    """What a worker must find on its machine.

    Attributes:
      folder: the driver's working directory, from which the configuration's paths are seen.
      run_dir: the study's directory, absolute.
      probe: a file in it that the driver has just written.
      token: what that file holds.
      versions: of the packages that must be the driver's.
    """

    folder: str
    run_dir: Path
    probe: Path
    token: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Opened:
    """A worker that is ready.

    Attributes:
      host: its machine.
      pid: its process.
      devices: what it trains on: ``"gpu × 1"``.
      capacity: trials that train in it at the same time.
      plan: what is trained, rows of a table.
      fingerprints: of its data.
    """

    host: str
    pid: int
    devices: str
    capacity: int
    plan: list[dict[str, Any]]
    fingerprints: dict[str, dict[str, Any]]


@dataclass
class Report:
    """What a call of :meth:`Worker.train` came to.

    Attributes:
      outcomes: trials that are scored, by number.
      interrupted: it was told to stop; everything is saved.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    interrupted: bool = False


def versions() -> dict[str, str]:
    """Of the packages that decide what a trial comes to."""
    return {name: version(name) for name in ("jaxtune", "jax")}


def _logged(method: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves the traceback of an error in the worker's log: the driver tells its last line alone."""

    @functools.wraps(method)
    def call(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except UserError:
            raise
        except Exception:
            traceback.print_exc()
            raise

    return call


class Worker:
    """Runs in a process of its own, as a Ray actor.

    One thread trains; :meth:`describe` and :meth:`stop` are called in another meanwhile. It never sees the journal.

    Args:
      index: its place among the workers, from 0.
    """

    def __init__(self, index: int):
        self._index = index
        self._stop = threading.Event()
        self._runner: TrainerRunner | None = None
        self._locks: dict[int, int] = {}

    @_logged
    def open(self, config: dict[str, Any], site: Site) -> Opened:
        """Opens the model and the data, and checks every searched value against them.

        Raises:
          UserError: this machine lacks something that the driver has, or the configuration does not fit.
        """
        self._check_site(site)
        self._write_to(RunFiles(site.run_dir).worker_log_path(self._index))
        leave_out_absent_accelerators()
        enable_compilation_cache()
        self._run_dir = site.run_dir
        self._runner = checked_runner(
            Config.model_validate(config),
            run_dir=site.run_dir,
            hooks=Hooks(listener=lambda title: ProgressDisplay(title=title), should_stop=self._stop.is_set),
        )
        return Opened(
            host=socket.gethostname(),
            pid=os.getpid(),
            devices=f"{platform()} × {jax.device_count()}",
            capacity=self._runner.capacity,
            plan=self._runner.trainer(self._runner.opened.config).plan.table(),
            fingerprints=self._runner.opened.fingerprints,
        )

    @_logged
    def train(self, jobs: Sequence[tuple[Trial, int]]) -> Report:
        """Starts trials, and trains those that are started until at least one is scored."""
        runner = self._opened()
        report = Report()
        # Told to stop while it starts one, it goes on to where those under way are saved.
        with contextlib.suppress(Interrupted):
            for trial, until in jobs:
                self._locks[trial.id] = self._lock(trial)
                runner.start(trial, until)
        try:
            for trial, outcome in runner.wait():
                os.close(self._locks.pop(trial.id))
                report.outcomes[trial.id] = outcome
        except Interrupted:
            report.interrupted = True
        return report

    @_logged
    def test(self, trial: Trial | None) -> TestOutcome | None:
        """Measures a finished trial, or the untuned model, on the test split."""
        return self._opened().test(trial)

    @_logged
    def save_winner(self, trial: Trial) -> dict[str, Any]:
        """Writes what a trial trained as the study's."""
        return self._opened().save_winner(trial)

    def describe(self, trial: Trial) -> tuple[int, str]:
        """The trial's full length in optimizer steps, and the name of its program."""
        runner = self._opened()
        return runner.total_steps(trial), runner.program(trial)

    def stop(self) -> None:
        """Lets the thread that trains save and return."""
        self._stop.set()

    def _opened(self) -> TrainerRunner:
        assert self._runner is not None
        return self._runner

    def _check_site(self, site: Site) -> None:
        host = socket.gethostname()
        for name, wanted in site.versions.items():
            if (here := version(name)) != wanted:
                raise UserError(f"search.workers: {host} has {name} {here}, the driver {wanted}; install the same")
        try:
            os.chdir(site.folder)
        except OSError as error:
            raise UserError(
                f"search.workers: {host} has no {site.folder}, where the driver runs ({error.strerror}); paths of the "
                f"configuration are seen from there: share it, or start from a folder that all machines have"
            ) from error
        try:
            same = site.probe.read_text(encoding="utf-8") == site.token and os.access(site.run_dir, os.W_OK)
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"run_dir: {host} does not see what the driver writes to {site.run_dir}, or cannot write there; "
                f"checkpoints go from one worker to another, so all machines need one shared file system: choose a "
                f"directory there with run_dir=…"
            )

    def _write_to(self, path: Path) -> None:
        """Sends what this process prints, the libraries' words included, to a file beside the trials."""
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        logging.getLogger("absl").setLevel(logging.ERROR)
        print(f"-- worker {self._index}, process {os.getpid()} on {socket.gethostname()}", file=sys.stderr, flush=True)

    def _lock(self, trial: Trial) -> int:
        """Keeps two workers off the files of one trial: a worker that is given up may live on for a moment.

        Raises:
          Interrupted: told to stop while waiting.
          UserError: another worker still holds them.
        """
        path = RunFiles(self._run_dir).trial_lock_path(trial.files)
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                return acquire_lock(path, "trial")
            except UserError:
                if time.monotonic() > end:
                    raise
            if self._stop.wait(0.2):
                raise Interrupted
