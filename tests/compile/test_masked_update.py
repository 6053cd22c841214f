"""The whole matrix of compiles of the masked update; a smoke set is in the ordinary tests."""

from __future__ import annotations

import importlib.util

import pytest

from tests.kernels.masked_update.compiled import check_in_place, compile_update

pytestmark = pytest.mark.compile

TARGETS = ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h200:8"]

# Tensors of Llama-3-8B and blocks: rows of the feed-forward's input, tiles of its output, columns of the values,
# rows of the embedding.
TENSORS = {
    "up": ((4096, 14336), (128, None), 32),
    "down": ((14336, 4096), (128, 128), 3584),
    "value": ((4096, 1024), (None, 128), 8),
    "embedding": ((128256, 4096), (1002 * 8, None), 16),
}
# What is cut over eight devices: whole layers, cut inside; blocks of rows, shared out.
STACKS = {
    "layers": ((32, 4096, 14336), (None, None), 32, 1),
    "layers by columns": ((32, 4096, 4096), (None, None), 32, 2),
    "rows": ((128256, 4096), (2672, None), 48, 0),
}
DTYPES = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]


def _need(target):
    package = "libtpu" if target.startswith("v") else "jax_cuda13_plugin"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize(("dtype", "moment_dtype"), DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_alone(target, dtype, moment_dtype, tensor, share):
    _need(target)
    shape, block, count = TENSORS[tensor]
    compiled, held, _ = compile_update(target, shape, block, max(1, round(share * count)), dtype, moment_dtype)
    check_in_place(compiled, held, target)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("tensor", STACKS)
@pytest.mark.parametrize(("dtype", "moment_dtype"), DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_over_eight_devices(target, dtype, moment_dtype, tensor, share):
    _need(target)
    shape, block, count, cut = STACKS[tensor]
    # Blocks that are shared out are equally many on each device.
    unit = 8 if cut == 0 else 1
    selected = max(1, round(share * count / unit)) * unit
    compiled, held, _ = compile_update(target, shape, block, selected, dtype, moment_dtype, cut)
    check_in_place(compiled, held, target)
