"""The driver's rules over workers that a test scripts: who gets which trial, and what happens when one is lost."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxtune.config.schema import Config
from jaxtune.errors import UserError
from jaxtune.search.distributed import runner as driver
from jaxtune.search.distributed.worker import Opened, Report
from jaxtune.search.outcome import Outcome
from jaxtune.search.runner import Interrupted
from jaxtune.search.trial import Trial


class WorkerLost(Exception):
    """As Ray's own errors: raised by ``get`` where a process died."""


class TaskError(Exception):
    """As Ray's: carries what the worker raised."""


class ScriptedWorker:
    """Trains nothing: scores one trial a call, and dies over those that are poison and now and then otherwise."""

    def __init__(self, ray):
        self.ray, self.alive, self.stopped, self.jobs = ray, True, False, {}
        ray.workers.append(self)

    def open(self, config, site):
        assert site.probe.read_text() == site.token, "the probe is there before a worker looks for it"
        self.config = config
        return Opened(
            "host",
            len(self.ray.workers),
            "cpu × 1",
            self.ray.capacity,
            [{"module": "q"}],
            self.ray.data.pop(0) if self.ray.data else {},
        )

    def train(self, jobs):
        ray = self.ray
        self.jobs |= {trial.id: (trial, until) for trial, until in jobs}
        assert 0 < len(self.jobs) <= ray.capacity
        alone = [number for number in self.jobs if ray.losses.get(number, 0) > 1]
        assert not alone or len(self.jobs) == 1, "a suspect trains alone"
        if self.stopped:
            ray.saved |= self.jobs.keys()
            self.jobs = {}
            return Report(interrupted=True)
        poison = self.jobs.keys() & ray.poison
        if poison or ray.generator.random() < ray.mortality:
            for number, (trial, _) in self.jobs.items():
                # A worker that dies by chance has saved something since; poison never gets that far.
                if number not in ray.poison:
                    reached = driver.Checkpoints.newest_on_disk(trial.directory / "checkpoints") + 1
                    (trial.directory / "checkpoints" / str(reached)).mkdir(parents=True)
                    ray.losses[number] = 0
                ray.losses[number] = ray.losses.get(number, 0) + 1
            raise WorkerLost("killed")
        number = ray.generator.choice(sorted(self.jobs))
        _, until = self.jobs.pop(number)
        return Report({number: Outcome(float(number), None, until, 0.0)})

    def describe(self, trial):
        return 10, "one"

    def stop(self):
        self.stopped = True


class Call:
    def __init__(self, worker, function, arguments):
        self.worker, self.run = worker, lambda: function(*arguments)


class ScriptedRay:
    """What the driver uses of Ray, in this process; calls run when they are fetched, in any order."""

    exceptions = SimpleNamespace(RayTaskError=TaskError)

    def __init__(self, capacity=1, poison=(), mortality=0.0, seed=0, cores=8, together=False, data=()):
        self.capacity, self.poison, self.mortality = capacity, set(poison), mortality
        self.generator, self.cores, self.together = random.Random(seed), cores, together
        self.workers, self.losses, self.saved, self.down = [], {}, set(), False
        # Fingerprints that the workers tell in turn; of none that is left, nothing.
        self.data = list(data)

    def remote(self, **options):
        def decorate(_):
            return SimpleNamespace(remote=lambda index: self._handle(ScriptedWorker(self)))

        return decorate

    def _handle(self, worker):
        def method(name):
            def remote(*arguments):
                call = Call(worker, getattr(worker, name), arguments)
                if name == "stop":
                    call.run()
                return call

            return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))

        return SimpleNamespace(worker=worker, **{name: method(name) for name in ("open", "train", "describe", "stop")})

    def wait(self, calls, num_returns=1, timeout=None):
        least = num_returns if self.together else 1
        return self.generator.sample(calls, k=self.generator.randint(least, num_returns)), []

    def get(self, call):
        assert call.worker.alive
        return call.run()

    def kill(self, handle):
        handle.worker.alive = False

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": self.cores, "memory": 1e9}}]

    def cluster_resources(self):
        return {"CPU": self.cores}

    def shutdown(self):
        self.down = True


def make(ray, directory: Path, workers: int = 2, **arguments) -> driver.RayRunner:
    config = Config.model_validate(
        {
            "run_dir": str(directory),
            "model": {"path": "jaxtune:nano"},
            "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "completion": "{text}"},
            "train": {"steps": 10},
            "search": {"workers": workers, "space": {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]}}},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "start_ray", lambda address, workers: (ray, True))
        return driver.RayRunner(config, **arguments)


def trials(directory: Path, count: int) -> list[Trial]:
    return [Trial(number, {}, directory / "trials" / f"{number:03d}") for number in range(count)]


def run_all(runner, started) -> list[tuple[int, Outcome]]:
    """As a study does: every place is kept full."""
    waiting, running, ended = list(started), 0, []
    while waiting or running:
        while waiting and running < runner.capacity:
            runner.start(waiting.pop(0), 2)
            running += 1
        for trial, outcome in runner.wait():
            running -= 1
            ended.append((trial.id, outcome))
    return ended


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(2, 14),
    workers=st.integers(1, 4),
    capacity=st.integers(1, 4),
    poison=st.sets(st.integers(0, 13), max_size=1),
    mortality=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_every_trial_ends_once(tmp_path_factory, count, workers, capacity, poison, mortality, seed):
    """Whichever workers die, and in whatever order the others answer, and with a trial that kills them all."""
    # With one place the first trial has to be scored before another can be: then the study ends with an error.
    assume(not (workers * capacity == 1 and 0 in poison))
    directory = tmp_path_factory.mktemp("study")
    ray = ScriptedRay(capacity, poison, mortality, seed)
    runner = make(ray, directory, workers)
    assert runner.capacity == workers * capacity
    ended = run_all(runner, trials(directory, count))
    runner.close()
    assert sorted(number for number, _ in ended) == list(range(count))
    for number, outcome in ended:
        if number in poison:
            assert outcome.failed
            assert outcome.metrics == {"workers_lost": driver.LOSSES}
        else:
            assert outcome.score == number
    assert ray.down
    assert not any(worker.alive for worker in ray.workers)
    assert not list((directory / "workers").glob("probe*"))


def test_workers_that_die_whatever_they_train_are_no_trials_fault(tmp_path):
    """The study ends with an error, and no trial is recorded as failed."""
    runner = make(ScriptedRay(poison=range(9)), tmp_path)
    with pytest.raises(UserError, match=r"lost 3 workers each .* killed.*the same command goes on"):
        run_all(runner, trials(tmp_path, 9))
    runner = make(ScriptedRay(poison=[0]), tmp_path)
    with pytest.raises(UserError, match="trial 0 lost 3 workers, and no other"):
        run_all(runner, trials(tmp_path, 1))


def test_a_worker_that_cannot_open_ends_the_study(tmp_path):
    class Broken(ScriptedRay):
        def get(self, call):
            raise self.error

    ray = Broken()
    ray.error = WorkerLost("no device")
    with pytest.raises(UserError, match=r"died 3 times while opening \(WorkerLost: no device\)"):
        make(ray, tmp_path, workers=1)
    assert len(ray.workers) == 3
    assert ray.down
    # What a worker finds wrong is told at once, in its own words.
    ray = Broken()
    ray.error = TaskError()
    ray.error.cause = UserError("data.train: rows.jsonl is missing")
    with pytest.raises(UserError, match=r"^data.train: rows.jsonl is missing$"):
        make(ray, tmp_path, workers=1)
    assert len(ray.workers) == 1


def test_a_worker_with_other_data_than_the_first_ends_the_study(tmp_path):
    """One that opens later, on a machine with another file or after the file was edited, trains nothing."""
    here, there = ({"data.train": {"digest": digest}, "data.validation": {"digest": "same"}} for digest in "ab")
    ray = ScriptedRay(mortality=0.5, data=[here, here, here, there])
    runner = make(ray, tmp_path, workers=1)
    assert runner.fingerprints == here
    with pytest.raises(UserError, match=r"^data\.train: host reads other data than host read when it opened"):
        run_all(runner, trials(tmp_path, 30))
    assert len(ray.workers) == 4
    assert not ray.workers[-1].jobs


def test_a_stop_saves_what_every_worker_trains(tmp_path):
    ray, asked = ScriptedRay(capacity=2, together=True), []
    runner = make(ray, tmp_path, should_stop=lambda: bool(asked))
    for trial in trials(tmp_path, 4):
        runner.start(trial, 2)
    scored = {trial.id for trial, _ in runner.wait()}
    assert len(scored) == 2, "each worker has scored one, and waits with the other for its next call"
    asked.append(True)
    with pytest.raises(Interrupted):
        runner.wait()
    assert ray.saved == set(range(4)) - scored


def test_room_is_asked_for_before_a_worker_waits_for_it(tmp_path):
    with pytest.raises(UserError, match=r"no node of the Ray cluster has \{CPU: 1\} \(by node: CPU: 0\)"):
        make(ScriptedRay(cores=0), tmp_path)
