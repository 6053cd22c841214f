"""The first step that is not finite."""

from __future__ import annotations

import math

import jax.numpy as jnp
import pytest

from jaxtune.training.divergence import Divergence


class Counted(dict):
    """Metrics that count how many of them are kept."""

    kept = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        Counted.kept += 1

    def __del__(self):
        Counted.kept -= 1


@pytest.mark.parametrize("spoilt", ["loss", "grad_norm"])
def test_of_many_steps_that_nobody_looks_at_few_are_kept_and_the_first_spoilt_one_is_found(spoilt):
    divergence, most = Divergence(), 0
    for step in range(1, 1001):
        value = jnp.float32(math.nan if step in (497, 600) else 1.0)
        divergence.launched(step, Counted({"loss": 0.5, "learning_rate": math.inf, spoilt: value}))
        most = max(most, Counted.kept)
    assert most < 250
    assert divergence.read(1000)
    assert divergence.first is not None
    assert divergence.first[0] == 497


def test_only_steps_that_were_asked_for_are_waited_for():
    divergence = Divergence()
    divergence.launched(1, {"loss": 1.0})
    divergence.launched(2, {"loss": math.inf})
    assert not divergence.read(1)
    assert divergence.first is None
    assert divergence.read(2)
    assert divergence.first == (2, {"loss": math.inf})
