"""The TPU's attention kernel: in interpret mode against our own attention, and compiled inside the decoder."""

from __future__ import annotations

import glob
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.attention import attend
from jaxtune.models.splash import splash_applies, splash_attend
from jaxtune.parallel import make_mesh
from jaxtune.parallel.targets import target_devices
from tests.models.attention_operands import check_equal, check_isolated, operands, values_and_gradients
from tests.models.decoder_compile import compiled_gradient


@pytest.mark.parametrize("window", [None, 5, 150])
def test_equals_our_own_attention(window):
    check_equal(window, tolerance=2e-5, interpret=True)


@pytest.mark.parametrize("window", [None, 40])
def test_nothing_passes_between_documents_or_out_of_a_window(window):
    check_isolated(window, interpret=True)


@pytest.mark.skipif(not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"), reason="needs a TPU")
def test_on_the_hardware():
    environment = {**os.environ, "JAX_PLATFORMS": "tpu"}
    subprocess.run([sys.executable, "-m", "tests.models.attention_operands"], env=environment, check=True)


def test_a_population_under_vmap():
    qkv, segments, _ = operands(1, 1, 2, 128, 64, seed=2)
    trials = [jnp.stack([each, 0.5 * each]) for each in qkv]
    mapped = jax.vmap(lambda q, k, v: splash_attend(q, k, v, segments, 30, interpret=True))(*trials)
    ours = [attend(*[each[trial] for each in trials], segments, segments, None, 30) for trial in range(2)]
    np.testing.assert_allclose(mapped, jnp.stack(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_on_eight_devices(mesh):
    qkv, segments, cotangent = operands(4, 2, 1, 128, 64, seed=1)

    @jax.jit
    def sharded(*qkv):
        def function(q, k, v):
            return splash_attend(q, k, v, segments, None, mesh, interpret=True)

        return values_and_gradients(function, qkv, cotangent)

    ours = values_and_gradients(lambda q, k, v: attend(q, k, v, segments, segments, None), qkv, cotangent)
    for a, b in zip(sharded(*qkv), ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_who_gets_it():
    tpu, gpu = (make_mesh(1, 1, 1, target_devices(target)[:1]) for target in ("v5e:2x2", "h200:1"))
    assert splash_applies(256, 128, None, False, tpu)
    assert not splash_applies(256, 128, None, False, gpu)
    assert not splash_applies(256, 128, None, False, None)  # the default device of the tests is a CPU
    assert not splash_applies(256, 128, 50.0, False, tpu)
    assert not splash_applies(256, 128, None, True, tpu)
    assert not splash_applies(200, 128, None, False, tpu)


def test_the_decoder_compiles_for_a_tpu_with_it():
    text = compiled_gradient("v5e:2x2", head_dim=64, windows=(), length=128)
    # Forward, and two kernels backward; the forward one is not run again.
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "[1,2,2,128,128]" not in text  # no scores
