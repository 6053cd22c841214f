"""The low-rank kernel compiled for every TPU that we name, at shapes of Llama-3-8B and Qwen3-0.6B."""

from __future__ import annotations

import pytest

from tests.low_rank_programs import EIGHT, MODES, check, compile_layer


@pytest.mark.compile
@pytest.mark.parametrize("kind", list(EIGHT))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("k", "n"), [(4096, 4096), (4096, 14336), (14336, 4096), (1024, 2048), (1024, 3072)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("mode", list(MODES))
def test_forward_and_backward(kind, dtype, k, n, mode):
    check(compile_layer(kind, dtype, k, n, MODES[mode]))
