"""A population that is killed goes on from checkpoints of different steps, and makes the same study of it."""

from __future__ import annotations

import pytest
from synthetic import REFERENCE, SyntheticRunner, records, search_config

from jaxtune.search import Interrupted, Outcome, Study, Trial

CAPACITY = 3


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is put on the disk for good, nothing is fitted, and no summary explains anything."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("jaxtune.search.surrogate.Surrogate.fit", lambda self, observations: None)


class SideBySide(SyntheticRunner):
    """Trials take a step each at a time; those whose rate is low are longer.

    Args:
      saved: the step of each trial's checkpoint, by number.
      killed: after so many steps of this process it is over; None lets it live.
    """

    lockstep = True

    def __init__(self, saved: dict[int, int] | None = None, killed: int | None = None):
        super().__init__(capacity=CAPACITY)
        self.at = dict(saved or {})
        self.killed, self.ticks = killed, 0
        self.under_way: list[int] = []

    def total_steps(self, trial: Trial) -> int:
        return 50 if trial.configuration["optimizer.learning_rate"] > 1e-4 else 70

    def wait(self) -> list[tuple[Trial, Outcome]]:
        while not (ended := [one for one in self.started if self.at.get(one[0].id, 0) >= self._until(one)]):
            self.ticks += 1
            if self.ticks == self.killed:
                self.under_way = sorted(trial.id for trial, _ in self.started)
                raise Interrupted
            for trial, _ in self.started:
                self.at[trial.id] = self.at.get(trial.id, 0) + 1
        self.started = [one for one in self.started if one not in ended]
        return [(trial, self.run(trial, until)) for trial, until in ended]

    def _until(self, one: tuple[Trial, int]) -> int:
        trial, until = one
        return 4 if trial.configuration["optimizer.learning_rate"] > self.divergence else until

    def run(self, trial: Trial, until: int) -> Outcome:
        outcome = super().run(trial, until)
        return Outcome(outcome.score, None, self._until((trial, until)), 0.5, {}, diverged=outcome.diverged)


def run(directory, runner: SyntheticRunner, method: str):
    search = search_config(method=method, trials=9, promote=2, fraction=0.4, initial=4)
    return Study(directory, search, runner, reference=REFERENCE, base={"name": "test"}).run()


@pytest.mark.parametrize("method", ["random", "hyperband"])
def test_a_killed_population_proposes_what_it_would_have_proposed(tmp_path, method):
    """Whenever it is killed, and whatever its trials lose."""
    if method == "hyperband":
        pytest.importorskip("optuna")
    assert run(tmp_path / "whole", SideBySide(), method) is not None
    whole = records(tmp_path / "whole")
    proposed = [number for number, record in enumerate(whole) if record["event"] == "proposed"]
    assert proposed[-1] - proposed[0] > 9, "trials are scored between proposals"
    for killed in (7, 33) if method == "random" else (21,):
        for lost in range(CAPACITY):
            directory = tmp_path / f"{killed}-{lost}"
            first = SideBySide(killed=killed)
            assert run(directory, first, method) is None
            # One of the trials under way goes on from where it was, one from an older checkpoint, one from its start.
            saved = dict(first.at)
            assert len(first.under_way) == CAPACITY
            for place, number in enumerate(first.under_way):
                reached = saved.get(number, 0)
                saved[number] = (reached, reached // 5 * 5, 0)[(place + lost) % CAPACITY]
            assert run(directory, SideBySide(saved), method) is not None
            assert records(directory) == whole, (killed, lost)
