"""What runs the blocks of the experiments: what it keeps, what it goes on from, what it chooses."""

from __future__ import annotations

import json
import shutil

import pytest
from experiments import run_blocks as blocks


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_is_kept_is_whole_lines_and_brings_a_lost_run_back():
    job = next(blocks.jobs("A"))
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "config.yaml").write_text("name: a\n")
    (job.run_dir / "trials.jsonl").write_text('{"event": "study"}\n{"event": "propo')
    blocks.keep(job)
    shutil.rmtree(blocks.RUNS)
    blocks.restore(job)
    assert (job.run_dir / "trials.jsonl").read_text() == '{"event": "study"}\n'
    assert (job.run_dir / "config.yaml").read_text() == "name: a\n"
    # What is there is further than what was kept.
    (job.run_dir / "trials.jsonl").write_text('{"event": "study"}\n{"event": "proposed"}\n')
    blocks.restore(job)
    assert len((job.run_dir / "trials.jsonl").read_text().splitlines()) == 2


def test_the_blocks_are_those_of_the_protocol():
    names = [job.name for job in blocks.jobs("ABCRDEFM")]
    assert len(names) == len(set(names)) == 2 * (1 + 1 + 3 + 1 + 1 + 1) + 2
    assert names[-2:] == ["F-attr_oamine", "M-attr_oamine"]


def test_random_search_is_what_the_rule_of_a_search_chooses_of_the_first_trials():
    """Of sixteen the five best at 20 % and the reference are finished; one that came later, or was sixth, is not."""
    task = blocks.TASKS[0]
    trials = [
        {
            "id": number,
            "configuration": {"optimizer.learning_rate": 1e-4 * (number + 1)},
            "scores": {"0.2": 5.0 - 0.1 * number if number else 9.0},
            "final_score": 1.0 + 0.1 * number,
        }
        for number in range(20)
    ]
    trials[3]["final_score"] = 0.1  # the best of all, and too far behind at 20 %
    trials[17]["final_score"] = 0.2  # not among the first sixteen
    trials[12]["final_score"] = 0.9
    folder = blocks.OUT / f"early-score-{task}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"trials": trials}))
    assert blocks.chosen_at_random(task) == trials[12]["configuration"]
    arms = blocks.rates(task)
    assert [arm["configuration"]["optimizer.learning_rate"] for arm in arms] == list(blocks.RATES)
    assert [one["configuration"]["train.seed"] for one in blocks.ceiling(task)] == [1] * 8
