"""The linear cross-entropy, forward and backward, for every target, shape and dtype."""

from __future__ import annotations

import re

import pytest

from tests.kernels.linear_cross_entropy.compiled import SHAPES, check_memory, compiled, instructions

pytestmark = pytest.mark.compile

TARGETS = {"v5e": "v5e:4x2", "v5p": "v5p:2x2x2", "v6e": "v6e:4x2", "h200": "h200:8"}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_on_one_device(target, shape, dtype, trained):
    program = compiled(TARGETS[target], shape, dtype=dtype, tied=shape != "llama-3-8b", trained=trained)
    check_memory(program, shape, rows=8192, trained=trained, rounded=dtype == "float32" and target != "h200")
    d, vocabulary = SHAPES[shape]
    # Where jaxlib cannot print the program, the memory that it needs has to do.
    text = instructions(program)
    assert f"[8192,{vocabulary}]" not in text
    if not trained:
        assert not re.search(rf"f32\[({d},{vocabulary}|{vocabulary},{d})\]", text) or dtype == "float32"


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("target", TARGETS)
def test_over_eight_devices(target, trained, tied):
    program = compiled(TARGETS[target], "llama-3-8b", tied=tied, trained=trained, axes=(2, 4))
    text = instructions(program)
    assert "all-reduce" in text
    # libtpu has a thread that it calls all-to-all-emitter-barrier.
    assert not re.search("all-gather|all-to-all(?!-emitter)", text)
    check_memory(program, "llama-3-8b", rows=4096, shards=4, trained=trained)


@pytest.mark.parametrize("target", ["v5e", "h200"])
def test_a_head_cut_along_its_inputs_too_is_gathered_once_and_not_over_the_vocabulary(target):
    program = compiled(TARGETS[target], "llama-3-8b", axes=(2, 4), fsdp=True)
    gathers = [line for line in program.as_text().splitlines() if re.search(r" all-gather(-start)?\(", line)]
    assert gathers
    assert all("/while/" not in line for line in gathers)
    assert "[4096,128256]" not in program.as_text()
