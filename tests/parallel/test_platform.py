"""What differs between platforms."""

from __future__ import annotations

import platform as platform_module
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtune.errors import UserError
from jaxtune.parallel import platform as platforms
from jaxtune.parallel.targets import target_devices


@pytest.fixture
def chosen():
    """The platforms that jax is told to use, as if nobody had chosen any; put back afterwards."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield lambda: jax.config.jax_platforms
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("files", "expected"), [([], "cpu"), (["null"], "cpu"), (["nvidia0"], None), (["accel0"], None), (["vfio/3"], None)]
)
def test_accelerators_without_a_device_file_are_left_out(monkeypatch, tmp_path, chosen, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(platforms, "Path", lambda _: Path(tmp_path))
    monkeypatch.setattr(platforms, "sys", SimpleNamespace(platform="linux"))
    platforms.leave_out_absent_accelerators()
    assert chosen() == expected


def test_a_choice_of_platforms_stays(monkeypatch, tmp_path, chosen):
    monkeypatch.setattr(platforms, "Path", lambda _: Path(tmp_path))
    jax.config.update("jax_platforms", "cuda,cpu")
    platforms.leave_out_absent_accelerators()
    assert chosen() == "cuda,cpu"


@pytest.mark.parametrize("target", ["v5e:2x2", "h200:1", None])
def test_pallas_kernels_are_refused_where_there_are_none(target):
    devices = jax.devices()[:1] if target is None else target_devices(target)
    mesh = Mesh(np.array(devices), ("data",))
    for kernels in ("auto", "xla", "interpret"):
        platforms.check_kernels(kernels, mesh)
    if target is not None:
        platforms.check_kernels("pallas", mesh)
        return
    with pytest.raises(UserError, match=r"kernels: 'pallas' needs TPUs or .*, not 'cpu'; choose 'auto' or 'xla'"):
        platforms.check_kernels("pallas", mesh)


@pytest.mark.parametrize(("target", "dtype"), [("v5e:2x2", "bfloat16"), ("h200:1", "bfloat16"), (None, "float32")])
def test_the_compute_dtype_is_that_of_the_mesh(target, dtype):
    devices = jax.devices() if target is None else target_devices(target)
    assert platforms.compute_dtype("auto", Mesh(np.array(devices), ("data",))) == dtype


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("cpu", None)],
)
def test_the_peak_is_that_of_the_device_and_not_of_one_with_a_shorter_name(kind, peak):
    assert platforms._peak_of_kind(kind) == peak


@pytest.mark.parametrize("root", ["", "relative"])
def test_programs_are_not_kept_in_the_working_directory(monkeypatch, tmp_path, root):
    monkeypatch.setenv("XDG_CACHE_HOME", root)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        for unset in (None, ""):
            jax.config.update("jax_compilation_cache_dir", unset)
            platforms.enable_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "jaxtune" / "xla")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        platforms.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


_TOUCHED_AGAIN = """
import ctypes, resource, threading
from jaxtune.parallel.platform import keep_freed_memory
keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.memset.argtypes, library.free.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), (ctypes.c_void_p,)

def touch():
    for number in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = library.malloc(64 << 20)
        library.memset(block, 1, 64 << 20)
        library.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
thread = threading.Thread(target=touch)
thread.start()
thread.join()
print(*faults)
"""


@pytest.mark.skipif(platform_module.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept():
    """Sixteen thousand pages are filled once; a thread's heap, unlike the main one's, would map them again."""
    done = subprocess.run([sys.executable, "-c", _TOUCHED_AGAIN], capture_output=True, text=True, check=True)
    _, *again = map(int, done.stdout.split())
    assert max(again) < 100
