"""A study killed at random moments ends with the same trials, and runs at most the trial under way again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic import records

SCRIPT = Path(__file__).with_name("synthetic.py")
DELAY = 0.15


def start(run_dir: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(run_dir), "5", str(DELAY)])


def lines(run_dir: Path) -> int:
    path = run_dir / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_trials(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(whole)
    generator = random.Random(0)
    kills = 0
    # The whole journal has 27 lines or so; each kill comes a random while after a random later line.
    for target in sorted(generator.sample(range(1, 24), 4)):
        process = start(killed)
        while lines(killed) < target and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 1.5 * DELAY))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert start(killed).wait(timeout=300) == 0
    assert reference.wait(timeout=300) == 0
    assert kills >= 3
    assert records(killed) == records(whole)
    assert (killed / "summary.json").read_text() != ""
    counted = {
        directory: [len(file.read_text().splitlines()) for file in sorted(directory.glob("trials/*/calls.txt"))]
        for directory in (whole, killed)
    }
    assert sum(counted[killed]) <= sum(counted[whole]) + kills
