"""A few compiles for real targets; all of them are in `tests/compile`."""

from __future__ import annotations

import re

import pytest

from tests.kernels.linear_cross_entropy.compiled import check_memory, compiled


@pytest.mark.parametrize("target", ["v5e:2x2", "h200:1"])
def test_a_frozen_head_compiles_without_logits(target):
    program = compiled(target, "llama-3-8b")
    check_memory(program, "llama-3-8b", rows=8192)
    # Nowhere, not even in a fusion, are there logits of all rows, or a gradient of the head.
    assert not re.search(r"\[8192,128256\]|f32\[4096,128256\]", program.as_text())


def test_the_vocabulary_stays_cut_over_devices():
    program = compiled("v5e:4x2", "llama-3-8b", tied=True, axes=(2, 4))
    text = program.as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    check_memory(program, "llama-3-8b", rows=4096, shards=4)
