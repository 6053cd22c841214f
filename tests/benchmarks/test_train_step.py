"""The benchmark of a training step: turns of two processes become figures, and results stand beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import train_step as script

# A side that steps in no time and says that it took two seconds, in which it learnt from ten tokens.
_STAND_IN = """
import json, sys
for line in sys.stdin:
    count = int(line)
    done = {"seconds": [2.0] * count, "processor_seconds": [3.0] * count, "tokens": [10] * count}
    print(json.dumps(done), flush=True)
print(json.dumps({"peak": 7}))
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Of a small measurement whose sides are stand-ins."""
    file = tmp_path / "side.py"
    file.write_text(_STAND_IN)
    monkeypatch.setattr(script, "__file__", str(file))
    values = {"shape": "tiny", "dtype": "float32", "batch": 2, "length": 16, "turns": 3, "steps": 2, "warmup": 1}
    return script.argparse.Namespace(**values)


def test_sides_take_turns_and_their_steps_are_told(arguments, tmp_path):
    found = script.measure(("jaxtune", "peft"), "full", tmp_path, arguments)
    assert list(found) == ["jaxtune", "peft"]
    for side in found.values():
        assert side["turns"] == [2.0] * 3
        assert (side["seconds_median"], side["processor_seconds_median"], side["tokens_per_second"]) == (2, 3, 5)
        assert side["peak_bytes"] == 7


def test_a_side_that_ends_early_is_told(arguments, tmp_path):
    Path(script.__file__).write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"--alone=?\s?peft\b.* ended with 3"):
        script.measure(("peft",), "full", tmp_path, arguments)


def test_results_stand_beside_those_of_other_processors(tmp_path):
    file = tmp_path / "results.json"
    for processor, ratio in (("A", 1.0), ("B", 2.0), ("A", 3.0)):
        script.add_to(file, {"ratio": ratio, "machine": {"processor": processor}})
    runs = json.loads(file.read_text())["runs"]
    assert [(run["machine"]["processor"], run["ratio"]) for run in runs] == [("B", 2.0), ("A", 3.0)]


def test_without_the_peer_its_columns_are_empty():
    ours = dict.fromkeys(("tokens_per_second", "tokens_per_second_best", "useful_tokens_per_second"), 1.0)
    shown = script.as_text({"jaxtune": {**ours, "peak_bytes": 2**21}, "peft": None})
    assert shown.count("–") == 8
