"""What a checkpoint tells of the steps before it."""

from __future__ import annotations

import dataclasses
import json
import math

from hypothesis import given
from hypothesis import strategies as st

from jaxtune.training.loop_state import LoopState

numbers = st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=2)


@given(
    st.builds(
        LoopState,
        best=st.floats(allow_nan=False, allow_infinity=False) | st.just(math.inf),
        misses=st.integers(0, 3),
        metrics=numbers,
        evaluation=numbers,
        evaluated=st.none() | st.integers(1, 9),
        steps=st.integers(0, 9),
        examples=st.integers(0, 99),
    )
)
def test_it_comes_back_from_json(state):
    assert LoopState.read(json.loads(json.dumps(state.record())), 9) == state


def test_a_checkpoint_of_an_earlier_version_tells_less():
    record = {"data": {}, "best": None, "misses": 1, "why": "time", "evaluation": {}}
    assert LoopState.read(record, 4) == LoopState(misses=1)
    scored = {**record, "best": 0.5, "evaluation": {"validation_loss": 0.5}}
    found = LoopState.read(scored, 4)
    assert (found.best, found.evaluated, found.evaluation) == (0.5, 4, {"validation_loss": 0.5})
    # Its steps are not counted, so that they do not dilute the mean.
    assert found.examples_per_step is None
    assert dataclasses.replace(found, steps=2, examples=8).examples_per_step == 4.0


def test_an_evaluation_that_is_no_number_is_no_improvement():
    state = LoopState()
    for score, misses in ((2.0, 0), (math.nan, 1), (2.0, 2), (1.0, 0)):
        state.improved(score)
        assert state.misses == misses
    assert state.best == 1.0
