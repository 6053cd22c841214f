"""What an installation asks for, and where platforms differ."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_base_needs_no_torch_no_tensorflow_and_no_accelerator():
    names = {re.split(r"[\[<>=~! ;]", requirement)[0].lower() for requirement in PROJECT["dependencies"]}
    assert {"jax", "flax", "optax", "grain", "transformers", "scikit-optimize", "tensorflow-datasets"} <= names
    assert not names & {"torch", "tensorflow", "libtpu", "peft", "datasets"}
    assert not any("[" in requirement for requirement in PROJECT["dependencies"]), "an extra of jax breaks laptops"
    extras = PROJECT["optional-dependencies"]
    assert any("jax[cuda13]" in requirement for requirement in extras["cuda"])
    assert any("jax[tpu]" in requirement for requirement in extras["tpu"])
    assert {"cuda", "tpu", "report", "distributed", "peers", "test"} <= extras.keys()


def test_every_import_of_the_package_is_required_or_optional_by_name():
    """A module that is imported when a file loads must be one that the base installation brings."""
    brought = {"flax", "grain", "jax", "jinja2", "optax", "orbax", "pydantic", "rich", "safetensors", "skopt"}
    brought |= {"tensorboardX", "tensorflow_datasets", "transformers", "psutil", "pyarrow", "yaml", "jaxtyping"}
    # What jax, pydantic, jinja2, tensorflow-datasets and scikit-optimize cannot do without.
    brought |= {"numpy", "ml_dtypes", "scipy", "pydantic_core", "etils", "markupsafe", "sklearn"}
    pattern = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)
    for file in sorted((ROOT / "jaxtune").rglob("*.py")):
        for name in pattern.findall(file.read_text(encoding="utf-8")):
            known = brought | {"jaxtune", "jaxtune_kernels"} | sys.stdlib_module_names
            assert name in known, f"{file.relative_to(ROOT)} imports {name}"


def test_no_row_of_a_log_softmax_is_picked_by_a_product():
    """jaxlib 0.10.2 was seen to compute wrong rows on CPUs, of a log-softmax times a one-hot of many rows."""
    for folder in ("jaxtune", "kernels", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            assert not re.search(r"\bone_hot\b", file.read_text(encoding="utf-8")), file


def test_only_one_place_asks_for_the_platform():
    asks = re.compile(r"default_backend\(|\.platform\b(?! import)|device_kind")
    found = {
        str(file.relative_to(ROOT / "jaxtune"))
        for file in (ROOT / "jaxtune").rglob("*.py")
        if asks.search(re.sub(r"^from .*$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    }
    # Three print what they find; the targets are devices that are not here.
    told = {"cli/doctor.py", "cli/profile.py", "telemetry/environment.py"}
    assert found - told - {"parallel/targets.py"} == {"parallel/platform.py"}


# What Python looks like on Windows, as far as it can be told before anything else is imported.
WINDOWS = "import os, pathlib, sys; sys.modules['fcntl'] = None; sys.platform = 'win32'; os.name = 'nt'; "


@pytest.mark.parametrize("fake", [WINDOWS, "import sys; sys.modules['fcntl'] = None; "], ids=["windows", "no fcntl"])
def test_where_it_cannot_run_one_message_says_so(fake):
    said = "jaxtune runs on Linux and macOS; on Windows, install it inside WSL"
    script = "sys.argv = [r'C:\\Python\\Scripts\\jaxtune.exe', '--help']; from jaxtune.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", fake + script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"jaxtune: {said}")
    assert ended.stderr.count("\n") == 1, "one line, no traceback"
    caught = "\ntry:\n    import jaxtune\nexcept ImportError as error:\n    print(error)"
    ended = subprocess.run([sys.executable, "-c", fake + caught], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.startswith(said), ended.stderr


def test_the_command_of_a_module_says_it_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fcntl'] = None")
    ended = subprocess.run(
        [sys.executable, "-m", "jaxtune", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("jaxtune: jaxtune runs on Linux and macOS")
    assert ended.stderr.count("\n") == 1


def test_packages_are_at_hand_without_an_import_of_their_own():
    ask = "import jaxtune; print(jaxtune.search.search.__name__, hasattr(jaxtune, 'searches'), hasattr(jaxtune, '_x'))"
    ended = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "search False False\n", ended.stderr
