import math

import jax
import jax.numpy as jnp
import pytest

from jaxtune.training.schedules import learning_rate

VALUES = {
    "train.steps": 100.0,
    "optimizer.learning_rate": 2.0,
    "optimizer.warmup": 0.1,
    "optimizer.final_scale": 0.25,
}


def at(step, schedule, **changed):
    values = {name: jnp.float32(value) for name, value in {**VALUES, **changed}.items()}
    return float(learning_rate(jnp.int32(step), values, schedule))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_a_line_that_starts_above_zero(schedule):
    assert at(0, schedule) == pytest.approx(0.2)
    assert at(4, schedule) == pytest.approx(1.0)
    assert at(9, schedule) == pytest.approx(2.0)


def test_the_decay_follows_the_closed_form():
    for step in (10, 37, 55, 99, 100):
        progress = (step - 10) / 90
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        assert at(step, "cosine") == pytest.approx(2.0 * (0.25 + 0.75 * cosine), rel=1e-5)
        assert at(step, "linear") == pytest.approx(2.0 * (0.25 + 0.75 * (1 - progress)), rel=1e-5)
        assert at(step, "constant") == 2.0


def test_no_warm_up_starts_at_the_peak():
    assert at(0, "constant", **{"optimizer.warmup": 0.0}) == 2.0


def test_length_and_warm_up_are_traced():
    traces = 0

    @jax.jit
    def rate(step, values):
        nonlocal traces
        traces += 1
        return learning_rate(step, values, "cosine")

    for steps, warmup in ((10.0, 0.0), (100.0, 0.2), (1000.0, 0.9)):
        rate(
            jnp.int32(3),
            {name: jnp.float32(v) for name, v in {**VALUES, "train.steps": steps, "optimizer.warmup": warmup}.items()},
        )
    assert traces == 1
