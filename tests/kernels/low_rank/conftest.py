from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture(autouse=True)
def interpreted():
    """Kernels for TPU run in jax's plain interpreter: compiled, with NaN in all memory that nothing has written."""
    with pltpu.force_tpu_interpret_mode(True):  # pyright: ignore[reportArgumentType]
        yield
