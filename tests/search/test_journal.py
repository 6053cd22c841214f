"""The journal: what is in it survives a crash, and damage is named."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxtune.errors import UserError
from jaxtune.search.journal import Journal, difference, read_journal


def _write(directory, count):
    with Journal(directory) as journal:
        for index in range(count):
            journal.append("scored", trial=index, score=index / 7)


def test_records_are_read_back_exactly(tmp_path):
    values = [0.1, 1e-300, 1 / 3, 2**53 - 1]
    with Journal(tmp_path) as journal:
        journal.append("scored", trial=np.int64(3), score=np.float32(0.5), values=values, name=np.str_("ä"))
    with Journal(tmp_path) as journal:
        record = journal.records[0]
    assert {key: record[key] for key in ("trial", "score", "values", "name")} == {
        "trial": 3,
        "score": 0.5,
        "values": values,
        "name": "ä",
    }


def test_numbers_that_json_lacks_become_null(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append("failed", trial=0, score=math.nan, metrics={"loss": math.inf, "steps": (1, -math.inf)})
    line = (tmp_path / "trials.jsonl").read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    record = json.loads(line)
    assert (record["score"], record["metrics"]) == (None, {"loss": None, "steps": [1, None]})


@pytest.mark.parametrize("keep", range(1, 40, 6))
def test_a_torn_last_line_is_cut_off_and_told(tmp_path, caplog, keep):
    _write(tmp_path, 3)
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    path.write_bytes(whole[: start + keep])
    assert len(read_journal(tmp_path)) == 2
    assert path.read_bytes() == whole[: start + keep], "a reader changes nothing"
    recovered = Journal(tmp_path)
    assert "last line is incomplete" in caplog.text
    with recovered as journal:
        assert [record["trial"] for record in journal.records] == [0, 1]
        journal.append("scored", trial=2, score=1.0)
    assert [record["trial"] for record in read_journal(tmp_path)] == [0, 1, 2]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    _write(tmp_path, 2)
    path = tmp_path / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with Journal(tmp_path) as journal:
        journal.append("scored", trial=2, score=1.0)
    assert [record["trial"] for record in read_journal(tmp_path)] == [0, 1, 2]


def test_a_damaged_middle_line_is_named(tmp_path):
    _write(tmp_path, 3)
    path = tmp_path / "trials.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:-4]
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"trials\.jsonl, line 2"):
        Journal(tmp_path)
    assert path.read_bytes() == before
    lines[1] = '["valid JSON", "no record"]'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_journal(tmp_path)


def test_no_journal_is_said(tmp_path):
    with pytest.raises(UserError, match="no such journal"):
        read_journal(tmp_path)


def test_a_second_holder_is_refused_and_told_the_first(tmp_path):
    with Journal(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_another_process_is_refused_until_the_first_is_gone(tmp_path):
    code = (
        "import sys, time\nfrom jaxtune.search.journal import Journal\n"
        "journal = Journal(sys.argv[1])\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            Journal(tmp_path)
    finally:
        process.kill()
        process.wait()
    Journal(tmp_path).close()


def test_a_full_disk_leaves_whole_records(tmp_path, monkeypatch):
    with Journal(tmp_path) as journal:
        journal.append("scored", trial=0)
        write = os.write

        def full(descriptor, data):
            write(descriptor, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left") as raised:
            journal.append("scored", trial=1)
        assert raised.value.filename == str(tmp_path / "trials.jsonl")
        monkeypatch.setattr(os, "write", write)
        journal.append("scored", trial=2)
    assert [record["trial"] for record in read_journal(tmp_path)] == [0, 2]


def test_differences_are_named():
    recorded = {"model": {"path": "a"}, "update": [{"rank": 8}], "same": [1, (2, 3)]}
    assert difference(recorded, {"model": {"path": "a"}, "update": [{"rank": 8.0}], "same": [1, [2, 3]]}) is None
    assert difference(recorded, {**recorded, "update": [{"rank": 16}]}) == "update.0.rank is 8 there and 16 here"
    assert (
        difference(recorded, {"model": {"path": "a"}, "update": [{"rank": 8}]})
        == "same is [1, [2, 3]] there and absent here"
    )
    assert difference({}, {"seed": 1}, "search") == "search.seed is absent there and 1 here"
