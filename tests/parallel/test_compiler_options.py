"""What the compiler is told beside the program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtune.parallel import compiler_options as module
from jaxtune.parallel.compiler_options import compiler_options
from jaxtune.parallel.targets import target_devices


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Makes this machine's processor one of a maker."""

    def made_by(vendor):
        monkeypatch.setattr(module, "_PROCESSOR", tmp_path / "cpuinfo")
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: One: of two\n" * 2)
        module._maker.cache_clear()

    yield made_by
    module._maker.cache_clear()


@pytest.mark.parametrize("target", ["v5e:2x2", "h200:1"])
def test_accelerators_are_told_nothing(target, processor):
    processor("AuthenticAMD")
    assert compiler_options(Mesh(np.array(target_devices(target)), ("data",))) is None


def test_the_maker_of_the_processor_decides(processor):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    processor("GenuineIntel")
    assert compiler_options(mesh) is None
    processor("AuthenticAMD")
    assert compiler_options(mesh) == compiler_options()
    assert set(compiler_options(mesh) or {}) <= set(module._OWN_PRODUCTS)


def test_what_this_jaxlib_does_not_know_is_left_out_and_tried_once(monkeypatch, processor):
    told = {"xla_cpu_multi_thread_eigen": True, "xla_cpu_no_such_option": "1"}
    monkeypatch.setattr(module, "_BY_MAKER", {"Other": told})
    processor("Other")
    before = module._is_known.cache_info().misses
    for _ in range(2):
        assert compiler_options() == {"xla_cpu_multi_thread_eigen": True}
    assert module._is_known.cache_info().misses == before + 2


def test_the_options_change_what_is_compiled():
    """An option that the compiler takes and does nothing with would be found here."""
    square = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def text(options):
        return jax.jit(jnp.dot, compiler_options=options).lower(square, square).compile().as_text()

    if "ynn_fusion" not in text(None):
        pytest.skip("this jaxlib does not take YNNPACK's products by itself")
    assert "ynn_fusion" not in text(module._known(module._OWN_PRODUCTS))
