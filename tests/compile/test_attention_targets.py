"""Attention inside the scanned decoder, forward and backward, for every target."""

from __future__ import annotations

import pytest

from tests.models.decoder_compile import compiled_gradient

pytestmark = pytest.mark.compile

KERNEL = 'custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("windows", "kinds"), [((), 1), ((100, 100), 1), ((100, None), 2)])
def test_tpus_get_the_splash_kernel(target, dtype, head_dim, windows, kinds):
    text = compiled_gradient(target, head_dim=head_dim, windows=windows, dtype=dtype, length=1024)
    assert text.count(KERNEL) == 3 * kinds


@pytest.mark.parametrize(("remat", "kernels"), [("none", 6), ("full", 8)])
def test_remat_runs_the_forward_kernel_again_only_where_it_was_told_to(remat, kernels):
    assert compiled_gradient("v5e:2x2", head_dim=128, windows=(100, None), remat=remat).count(KERNEL) == kernels


def test_rows_and_heads_stay_on_their_devices():
    text = compiled_gradient("v5e:2x2", head_dim=128, windows=(100, None), fsdp=2, tensor=2)
    assert text.count(KERNEL) == 6
    # One row and one of two key-value heads for each device: nowhere are the heads of both together.
    assert "[1,4,256,128]" not in text


@pytest.mark.parametrize("windows", [(), (100, None)])
def test_gpus_keep_our_own(windows):
    text = compiled_gradient("h200:2", head_dim=128, windows=windows, fsdp=2)
    assert "fmha" not in text
    assert "mosaic" not in text
