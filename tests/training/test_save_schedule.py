"""When a checkpoint is due."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune.config.training_sections import TrainConfig
from jaxtune.training import save_schedule
from jaxtune.training.save_schedule import SaveSchedule


def due(seconds_a_step=10.0, steps=20, evaluations=(), **settings):
    """The steps of a run after which it saves, with the reasons; only steps move its clock."""
    now = 0.0
    schedule = SaveSchedule(TrainConfig(steps=steps, **settings), clock=lambda: now)
    found = {}
    for step in range(1, steps + 1):
        now += seconds_a_step
        if why := schedule.why(step, evaluated=step in evaluations):
            found[step] = why
            schedule.restart(step)
    return found


def test_time_counts_from_the_last_checkpoint_whatever_it_was_for():
    assert due(checkpoint_minutes=1.0) == {6: "time", 12: "time", 18: "time"}
    assert due(checkpoint_minutes=None) == {}
    assert due(checkpoint_minutes=1.0, evaluate_every=8, evaluations=(8, 16)) == {
        6: "time",
        8: "evaluation",
        14: "time",
        16: "evaluation",
    }


def test_what_is_to_be_kept_is_written():
    keep = {"every": 8}
    assert due(checkpoint_minutes=None, keep=keep) == {8: "steps", 16: "steps"}
    assert due(checkpoint_minutes=None, keep=keep, checkpoint_every=5) == dict.fromkeys((5, 8, 10, 15, 16, 20), "steps")


def test_of_several_processes_the_first_one_decides_and_all_save_at_one_step(monkeypatch):
    """Two processes in lockstep; the second one's clock runs ten times as fast."""
    told = []
    monkeypatch.setattr(save_schedule.jax, "process_count", lambda: 2)
    times = [0.0, 0.0]
    schedules = [SaveSchedule(TrainConfig(steps=900), clock=lambda index=index: times[index]) for index in (0, 1)]
    saved = ([], [])
    for step in range(1, 901):
        times[:] = [times[0] + 1.0, times[1] + 10.0]
        asked = []

        def broadcast(value, asked=asked):
            asked.append(value)
            return asked[0]

        monkeypatch.setattr(save_schedule.multihost_utils, "broadcast_one_to_all", broadcast)
        for schedule, steps in zip(schedules, saved, strict=True):
            if schedule.why(step, evaluated=False):
                steps.append(step)
                schedule.restart(step)
        # Either both of them talk after a step, or none.
        assert len(asked) in (0, 2)
        told += asked[:1]
    assert saved[0] == saved[1] == [300, 600, 900]
    assert len(told) < 100
    assert all(value.dtype == np.int32 for value in told)


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan")])
def test_minutes_are_positive(minutes):
    with pytest.raises(ValueError, match="checkpoint_minutes"):
        TrainConfig(steps=1, checkpoint_minutes=minutes)
