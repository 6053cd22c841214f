"""The low-rank matmul compiled for Hopper GPUs at the shapes of Llama-3-8B and of Qwen3-0.6B."""

from __future__ import annotations

import pytest

from tests.kernels.low_rank.hopper_compile import compile_product
from tests.low_rank_programs import MODES, check, compile_layer

pytestmark = pytest.mark.compile

ROWS = 8192
LAYERS = {
    "llama-3-8b attention": (4096, 4096),
    "llama-3-8b keys": (4096, 1024),
    "llama-3-8b up": (4096, 14336),
    "llama-3-8b down": (14336, 4096),
    "qwen3-0.6b queries": (1024, 2048),
    "qwen3-0.6b keys": (1024, 1024),
    "qwen3-0.6b up": (1024, 3072),
    "qwen3-0.6b down": (3072, 1024),
}


@pytest.mark.parametrize("layer", ["llama-3-8b attention", "llama-3-8b up", "qwen3-0.6b queries"])
@pytest.mark.parametrize("mode", list(MODES))
def test_forward_and_backward_alone_and_over_eight_devices(layer, mode):
    # Along its second dimension a GPU gathers W by a transpose, a gather and another transpose.
    transposes = {"transpose", "fusion"} if mode == "rows cut" else ()
    check(compile_layer("h200", "bfloat16", *LAYERS[layer], MODES[mode]), frozenset(transposes))


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("target", ["h200:1", "h100:1"])
def test_compiles(target, layer, rank, groups, direction, dropout, capfd):
    compile_product(target, (groups, ROWS // groups, *LAYERS[layer]), rank, direction, capfd, dropout)
