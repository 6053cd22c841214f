"""Commands in odd surroundings: other number types, no home, closed streams, encodings without a dash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxtune.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
BEST = "the best – 中"
# What a command does with its streams, without the seconds that a real one takes to import.
PRINTS = f"""
import sys, jaxtune.cli as cli
cli.dispatch = lambda commands, given: print({BEST!r}) or print(sys.stdin.read(), end="", file=sys.stderr) or 0
sys.exit(cli.main(["x"]))
"""


def _run(code: str, closed: str = "", **environment: str | None) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment
    present = {name: value for name, value in merged.items() if value is not None}
    command = f'exec "$0" -c "$1" {closed}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, code], env=present, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed: str) -> None:
    done = _run(PRINTS, closed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else f"{BEST}\n")
    assert done.stderr == ""


def test_what_a_closed_stream_would_get_does_not_end_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    code = PRINTS.replace("sys.exit(", f"file = open({str(file)!r}, 'w'); sys.exit(").replace('cli.main(["x"])', "0")
    code = code.replace("file =", 'cli.main(["x"]); file =').replace("sys.exit", "print('late', flush=True); sys.exit")
    assert _run(code, ">&-").returncode == 0
    assert file.read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_may_lack_characters(encoding: str) -> None:
    done = _run(PRINTS, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the best ? ?\n"


def test_the_system_may_know_no_home(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, pwd
def unknown(number): raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = unknown
os.chdir({str(tmp_path)!r})
from jaxtune.cli import surroundings
surroundings.make_home_usable()
from jaxtune.files import cache_directory
print(cache_directory())
"""
    done = _run(code, HOME=None, XDG_CACHE_HOME=None)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_absolute()
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="makes a home of another user")
def test_the_home_may_be_another_users(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 4711, 4711)
    code = (
        "from pathlib import Path; from jaxtune.cli.doctor import _writable; print(_writable(Path.home() / '.cache'))"
    )
    dropped = "-dac_override,-dac_read_search"
    done = subprocess.run(
        ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", sys.executable, "-c", code],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_64_bit_numbers_change_nothing(config_file: Path, tmp_path: Path) -> None:
    """Training, evaluation by loss and by generation in jax's 64-bit mode: the same numbers, to rounding."""
    found = {}
    for name, wide in (("narrow", False), ("wide", True)):
        with jax.enable_x64(wide):
            overrides = [f"run_dir={tmp_path / name}", "train.steps=2", "evaluation.task=extraction"]
            assert main(["train", str(config_file), *overrides]) == 0
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["metrics"]
    for metric in ("loss", "validation_loss", "validation_loss_standard_error", "exact_match", "grad_norm"):
        assert found["narrow"][metric] == pytest.approx(found["wide"][metric], rel=2e-5), metric
