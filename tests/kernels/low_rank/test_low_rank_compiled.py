"""A few of the compiles of tests/compile, and that their check can fail."""

from __future__ import annotations

import pytest

from tests.low_rank_programs import MODES, check, compile_layer


@pytest.fixture(autouse=True)
def interpreted():
    """Not interpreted here."""


@pytest.mark.parametrize("mode", ["population", "columns cut", "rows cut"])
def test_compiles_for_tpu(mode):
    check(compile_layer("v5e", "bfloat16", 1024, 2048, MODES[mode]))


def test_odd_shapes_without_dropout_compile_for_tpu():
    # XLA chooses layouts of its own for such arguments, and copies W from there: only the launches are looked at.
    assert compile_layer("v5e", "float32", 1000, 333, MODES["alone"], dropout=False).launches == 2


def test_a_weight_gradient_is_seen():
    with pytest.raises(AssertionError, match="fusion"):
        check(compile_layer("v5e", "bfloat16", 1024, 2048, MODES["alone"], trained=True))
