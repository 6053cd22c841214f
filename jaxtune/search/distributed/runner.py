"""The driver's side: a :class:`~jaxtune.search.runner.TrialRunner` whose trials train in workers.

A worker that is lost (killed, its machine gone, an error in the middle of a program) is replaced, and its trials go
back to the front of the queue: whichever worker has room continues them from their newest checkpoint. Loss after loss
without a new checkpoint in between speaks against a trial. The second time it trains alone, so that its neighbours are
not blamed for it; the third time it is given up: a failed trial, as one that diverged. That verdict waits until a
worker scores another trial, since workers that die whatever they train are no trial's fault and end the study with an
error instead. (Ray Tune counts the failures of a trial in the same way, without the neighbours and without the
progress; a spot machine that is taken away every hour would use such a count up.)
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxtune.config import Config, with_overrides
from jaxtune.errors import UserError
from jaxtune.files import write_atomically
from jaxtune.layout import RunFiles
from jaxtune.models import DecoderConfig, read_config
from jaxtune.search.costs import counted_costs
from jaxtune.search.distributed.cluster import actor_options, places, start_ray, worker_resources
from jaxtune.search.distributed.worker import Opened, Report, Site, Worker, versions
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.settings import search_config
from jaxtune.search.trial import Trial
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.hooks import ShouldStop, never
from jaxtune.training.model_directory import model_directory

logger = logging.getLogger(__name__)

LOSSES = 3
"""Workers that a trial may lose, or that may be lost while they open, before it is given up."""

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 30.0


@dataclass
class _Job:
    """A trial that was started and is not scored.

    Attributes:
      losses: workers lost with it since its last new checkpoint.
      reached: its newest checkpoint when the last of them was lost.
    """

    trial: Trial
    until: int
    losses: int = 0
    reached: int = 0

    @property
    def alone(self) -> bool:
        """Whether it shares its worker with no other trial."""
        return self.losses > 1


@dataclass
class _Place:
    """One of the workers, and after it those that replace it.

    Attributes:
      actor: the process that holds the place now.
      call: what it is doing: opening, or training; None while it waits for work.
      opened: what it told when it had opened; None before.
      jobs: the trials that it trains, by number.
      unsent: those of them that it is not told of yet.
      losses: processes lost in a row before they had opened.
    """

    index: int
    actor: Any
    call: Any
    opened: Opened | None = None
    jobs: dict[int, _Job] = field(default_factory=dict)
    unsent: list[_Job] = field(default_factory=list)
    losses: int = 0

    def has_room(self, job: _Job) -> bool:
        """Whether the job may train here now."""
        if self.opened is None:
            return False
        if job.alone or any(other.alone for other in self.jobs.values()):
            return not self.jobs
        return len(self.jobs) < self.opened.capacity


class RayRunner:
    """Trains and scores the trials of one study in workers. The driver itself keeps off every accelerator.

    Args:
      config: with a ``search`` section: number of workers, what each takes, where Ray runs.
      should_stop: asked several times a second while the workers train.

    Attributes:
      plan: what is trained, rows of a table.

    Raises:
      Interrupted: told to stop before a worker had opened.
      UserError: Ray cannot be started or joined, has no room for a worker, or a worker finds that something is wrong:
        the configuration, its data, or that its machine does not see the driver's files; or a worker reads other data
        than the first.
    """

    def __init__(self, config: Config, *, should_stop: ShouldStop = never):
        # A driver that opened a GPU or TPU would take it from the worker on its own machine.
        jax.config.update("jax_platforms", "cpu")
        self._config = config
        self._search = search_config(config)
        self._should_stop = should_stop
        self._run_dir = Path(config.directory).absolute()
        self._queue: deque[_Job] = deque()
        self._scored: list[tuple[Trial, Outcome]] = []
        self._given_up: list[_Job] = []
        self._any_scored = self._stopping = False
        self._described: dict[str, tuple[int, str]] = {}
        self._places: list[_Place] = []
        self._first: Opened | None = None
        self._probe: Path | None = None
        self._ray, self._own = start_ray(self._search.ray_address, self._search.workers)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # What a study asks

    @property
    def capacity(self) -> int:
        """How many trials train at the same time once every worker has opened."""
        return self._search.workers * self._capacity

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of the data that all workers read, by configuration key."""
        assert self._first is not None
        return self._first.fingerprints

    @property
    def workers(self) -> list[Opened | None]:
        """Who holds each worker's place; None where one is opening."""
        return [place.opened for place in self._places]

    def training(self, index: int) -> list[int]:
        """Numbers of the trials in a worker."""
        return sorted(self._places[index].jobs)

    def total_steps(self, trial: Trial) -> int:
        """The trial's full length in optimizer steps."""
        return self._describe(trial)[0]

    def program(self, trial: Trial) -> str:
        """Names the compiled step that trains the trial."""
        return self._describe(trial)[1]

    def costs(self, overrides: Mapping[str, Any]) -> dict[str, float]:
        """The counted costs of a configuration, by name; counted here, as proposals ask while workers are waited for.

        Raises:
          UserError: a value does not fit its key, or the study counts FLOPs of a training whose steps the data decide.
        """
        costs = counted_costs(with_overrides(self._config, overrides, origin="search: "), self._model)
        if "flops" in set(self._search.counted) - costs.keys():
            raise UserError("train.epochs: with search.workers, flops are counted from train.steps; set that instead")
        return costs

    @functools.cached_property
    def _model(self) -> DecoderConfig:
        return read_config(model_directory(self._config))

    def _describe(self, trial: Trial) -> tuple[int, str]:
        key = json.dumps(trial.configuration, sort_keys=True, default=str)
        if key not in self._described:
            self._described[key] = self._ask("describe", trial, group="control")
        return self._described[key]

    def start(self, trial: Trial, until: int) -> None:
        """Queues a trial; the next :meth:`wait` sends it to a worker with room."""
        self._queue.append(_Job(trial, until))

    def wait(self) -> list[tuple[Trial, Outcome]]:
        """Returns as soon as any worker has scored a trial; the others train on meanwhile.

        Raises:
          Interrupted: told to stop, and every worker has saved.
          UserError: a worker reports it, or workers are lost whatever they train.
        """
        while not self._scored:
            if self._should_stop():
                self._stop()
                break
            if not self._active():
                self._judge()
                break
            self._assign()
            self._handle(self._ready())
        scored, self._scored = self._scored, []
        if not scored and self._stopping:
            raise Interrupted
        return scored

    def test(self, trial: Trial | None) -> TestOutcome | None:
        """Measures a finished trial, or the untuned base model (None), on the test split; None without a test split."""
        return self._ask("test", trial)

    def save_winner(self, trial: Trial) -> dict[str, Any]:
        """Lets a worker write what a trial trained as the study's adapter or model."""
        return self._ask("save_winner", trial)

    def close(self) -> None:
        """Lets the workers save what they train, ends them, and leaves Ray."""
        try:
            self._stop()
        except Exception:  # what ended the study is told already; a worker's last words are in its log
            logger.exception("a worker could not save")
        for place in self._places:
            self._ray.kill(place.actor)
        self._places = []
        if self._probe:
            self._probe.unlink(missing_ok=True)
        if self._own:
            self._ray.shutdown()
            self._own = False

    # Opening

    def _open(self) -> None:
        """Starts the workers and waits until the first of them is ready; the others join when they are."""
        self._resources = worker_resources(self._search.worker_resources, self._ray)
        if (room := places(self._resources, self._ray)) < self._search.workers:
            logger.warning("search.workers: %d asked for, the Ray cluster has room for %d", self._search.workers, room)
        token = secrets.token_hex(16)
        self._probe = RunFiles(self._run_dir).probe_path(token[:8])
        write_atomically(self._probe, token)
        self._site = Site(str(Path.cwd()), self._run_dir, self._probe, token, versions())
        self._places = [_Place(index, *self._begin(index)) for index in range(self._search.workers)]
        waited_since: float | None = time.monotonic()
        while (first := next((place.opened for place in self._places if place.opened), None)) is None:
            if self._should_stop():
                raise Interrupted
            self._handle(self._ready())
            if waited_since is not None and time.monotonic() - waited_since > _PATIENCE_SECONDS:
                waited_since = None
                logger.warning("still waiting for a worker; free in the cluster: %s", self._ray.available_resources())
        self._capacity, self.plan = first.capacity, first.plan

    def _begin(self, index: int) -> tuple[Any, Any]:
        """A fresh worker process, and its call to open."""
        decorate = self._ray.remote(
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"control": 1},
            scheduling_strategy="SPREAD",
            runtime_env=self._environment(),
            **actor_options(self._resources),
        )
        actor = decorate(Worker).remote(index)
        return actor, actor.open.remote(self._config.model_dump(mode="json"), self._site)

    def _environment(self) -> dict[str, Any]:
        """Variables of the driver's that decide what jax does, for workers that do not inherit them."""
        if self._search.ray_address is None:
            return {}  # and Ray takes a process that it has started beforehand
        kept = ("JAX_PLATFORMS", "XLA_FLAGS", "HF_HUB_OFFLINE")
        return {"env_vars": {name: os.environ[name] for name in kept if name in os.environ}}

    # Training

    def _active(self) -> bool:
        return bool(self._queue) or any(place.jobs for place in self._places)

    def _assign(self) -> None:
        """Sends queued trials to the workers with most room, and lets each worker that is idle train what it has.

        Where a trial that trains alone comes next, the emptiest worker takes no other until it is free for it.
        """
        by_load = sorted(self._places, key=lambda place: (len(place.jobs), place.index))
        reserved = None
        for job in list(self._queue):
            place = next((place for place in by_load if place is not reserved and place.has_room(job)), None)
            if place is None:
                if not job.alone:
                    break
                reserved = reserved or next((place for place in by_load if place.opened), None)
                continue
            self._queue.remove(job)
            place.jobs[job.trial.id] = job
            place.unsent.append(job)
            by_load.sort(key=lambda place: (len(place.jobs), place.index))
        for place in self._places:
            if place.jobs and place.call is None:
                place.call = place.actor.train.remote([(job.trial, job.until) for job in place.unsent])
                place.unsent = []

    def _ready(self) -> list[_Place]:
        """Workers whose call has ended, after at most a fraction of a second."""
        calls = {place.call: place for place in self._places if place.call is not None}
        if not calls:
            time.sleep(_POLL_SECONDS)
            return []
        ended, _ = self._ray.wait(list(calls), num_returns=1, timeout=_POLL_SECONDS)
        if ended:  # those that ended together are told together
            ended, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        return [calls[call] for call in ended]

    def _handle(self, ended: list[_Place]) -> None:
        for place in ended:
            call, place.call = place.call, None
            try:
                result = self._result(call)
            except (UserError, OSError):
                raise
            except Exception as error:
                self._lose(place, error)
                continue
            if isinstance(result, Opened):
                self._compare(result)
                place.opened, place.losses = result, 0
            else:
                self._take(place, result)

    def _compare(self, opened: Opened) -> None:
        """Refuses a worker with other data than the first one that opened: their scores would not compare."""
        self._first = self._first or opened
        for key, there in self._first.fingerprints.items():
            if opened.fingerprints.get(key) != there:
                raise UserError(
                    f"{key}: {opened.host} reads other data than {self._first.host} read when it opened; give all "
                    f"machines the same files, and change none while the study runs"
                )

    def _result(self, call: Any) -> Any:
        """What a call came to, with the worker's own error where it raised one."""
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause or error from None

    def _take(self, place: _Place, report: Report) -> None:
        for number, outcome in report.outcomes.items():
            self._scored.append((place.jobs.pop(number).trial, outcome))
        if report.outcomes:
            self._any_scored = True
            self._judge()

    def _stop(self) -> None:
        """Tells every worker to save, and waits until they have."""
        self._stopping = True
        for place in self._places:
            if place.opened and place.jobs:
                place.actor.stop.options(concurrency_group="control").remote()
                # Between two calls a worker holds trained steps that are not saved yet.
                place.call = place.call or place.actor.train.remote([])
        while busy := [place for place in self._places if place.opened and place.call is not None]:
            self._handle([place for place in self._ready() if place in busy])

    # Losses

    def _lose(self, place: _Place, error: Exception) -> None:
        """Puts a fresh worker in the place of one that is gone, and its trials back into the queue."""
        words = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {words[-1].strip() if words else ''}"
        log = RunFiles(self._run_dir).worker_log_path(place.index)
        jobs = list(place.jobs.values())
        told = ", ".join(str(job.trial.id) for job in jobs) or "none"
        where = f" on {place.opened.host}" if place.opened else ""
        logger.warning("worker %d%s is lost, with trials: %s (%s); see %s", place.index, where, told, why, log)
        self._ray.kill(place.actor)  # it may be cut off only, and must not train on
        place.losses = 0 if place.opened else place.losses + 1
        if place.losses >= LOSSES:
            raise UserError(
                f"search.workers: worker {place.index} died {LOSSES} times while opening ({why}); see {log}"
            )
        place.opened = None
        place.jobs, place.unsent = {}, []
        if self._stopping:
            return
        for job in reversed(jobs):
            self._give_back(job, why)
        place.actor, place.call = self._begin(place.index)

    def _give_back(self, job: _Job, why: str) -> None:
        """Queues a trial whose worker is lost, or gives it up."""
        reached = Checkpoints.newest_on_disk(job.trial.files.checkpoints_path)
        job.losses = 1 if reached > job.reached else job.losses + 1
        job.reached = reached
        if job.losses < LOSSES:
            self._queue.appendleft(job)
            return
        self._given_up.append(job)
        if len(self._given_up) > 1:
            folder = RunFiles(self._run_dir).workers_path
            numbers = " and ".join(str(job.trial.id) for job in self._given_up)
            raise UserError(
                f"search.workers: trials {numbers} lost {LOSSES} workers each without a new checkpoint, and no worker "
                f"scored another in between (last: {why}); see {folder}, and leave such values out "
                f"of search.space if it is they; the same command goes on"
            )

    def _judge(self) -> None:
        """Reports a trial that was given up as failed, once others are known to train well.

        Raises:
          UserError: nothing was ever scored.
        """
        if self._given_up and not self._any_scored:
            raise UserError(
                f"search.workers: trial {self._given_up[0].trial.id} lost {LOSSES} workers, and no other trial was "
                f"scored; see {RunFiles(self._run_dir).workers_path}; the same command goes on"
            )
        for job in self._given_up:
            logger.warning("trial %d lost %d workers in a row and counts as failed", job.trial.id, LOSSES)
            metrics = {"workers_lost": float(LOSSES)}
            self._scored.append((job.trial, Outcome(math.nan, None, job.reached, 0.0, metrics, diverged=True)))
        self._given_up = []

    def _ask(self, method: str, trial: Trial | None, *, group: str | None = None) -> Any:
        """The answer of a worker that has opened, the least busy one; of another where that one is lost."""
        losses = 0
        while True:
            while not any(place.opened for place in self._places):
                self._handle(self._ready())
            place = min((place for place in self._places if place.opened), key=lambda place: len(place.jobs))
            call = getattr(place.actor, method)
            call = call.options(concurrency_group=group).remote(trial) if group else call.remote(trial)
            try:
                while not self._ray.wait([call], timeout=_POLL_SECONDS)[0]:
                    if self._should_stop():
                        raise Interrupted
                return self._result(call)
            except (UserError, OSError, Interrupted):
                raise
            except Exception as error:
                self._lose(place, error)
                losses += 1
                if losses == LOSSES:
                    raise
