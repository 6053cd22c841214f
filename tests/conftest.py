"""Set-up of all tests: eight CPU devices, a kept compilation cache, and shapes and types checked at run time."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# These must be set before jax is imported; processes that a test starts inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the tests do, and LLVM's optimisations are half of that.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
_cache_root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
if not os.access(Path(_cache_root).parent, os.W_OK):
    _cache_root = tempfile.gettempdir()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(_cache_root) / "jaxtune-tests" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The kernels are a package of their own; an installed copy needs no help, a plain checkout does.
_kernels = str(Path(__file__).resolve().parent.parent / "kernels")
if _kernels not in sys.path:
    sys.path.insert(0, _kernels)

import jaxtyping  # noqa: E402

# Every annotation of our functions is checked when they run. The modules must not have been imported before this.
jaxtyping.install_import_hook(["jaxtune", "jaxtune_kernels"], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from jaxtune.signals import STOPS  # noqa: E402

# A shell's background job ignores Ctrl-C, and so would all tests; a notebook's client would put the default back.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example's time says nothing where tests share the processors, and a first one imports what it needs.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Fails a test that leaves a signal doing something else than before it, which other tests would meet."""
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    left = {number: handler for number in STOPS if (handler := signal.getsignal(number)) != before[number]}
    for number in left:
        signal.signal(number, before[number] or signal.SIG_DFL)
    assert not left


SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def babyllama() -> Path:
    """Directory of a small pretrained Llama checkpoint; the test is skipped where it is not at hand."""
    path = SHARED / "models" / "babyllama"
    if not path.is_dir():
        pytest.skip(f"no pretrained checkpoint at {path}")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of the real data sets; the test is skipped where they are not at hand."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"no data at {path}")
    return path


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """Eight devices as data 2 × fsdp 2 × tensor 2."""
    from jaxtune.parallel.mesh import make_mesh

    return make_mesh(data=2, fsdp=2, tensor=2)
