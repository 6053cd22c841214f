"""Data that change under a run: told before anything is trained, and gone on with on purpose only."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pytest

from jaxtune.config import load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.preflight import preflight
from jaxtune.training.run import train
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.trained import trained
from tests.changing_data import chats, day, edit, own_files

__all__ = ["chats", "day", "own_files"]


def stop_at(step):
    """Stops a run after so many steps."""
    asked = iter([False] * (step - 1) + [True])
    return lambda: next(asked)


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize("part", ["validation", "train"])
def test_a_changed_split_is_refused_and_accepted_on_purpose(own_files, tmp_path, caplog, part):
    run, key = tmp_path / "run", f"data.{part}"
    train(own_files, should_stop=stop_at(2))
    before = contents(run)
    edit(tmp_path / f"{part}.jsonl")
    for call in (train, lambda config: preflight(config, directory=RunDirectory(run))):
        with pytest.raises(UserError, match=rf"^{key} \(.*\): other data than the run in .*--accept-changed-data$"):
            call(own_files)
    assert contents(run) == before
    # What is only looked at is never refused.
    assert trained(OpenedConfig(own_files)).origin.endswith("at step 2")
    stopped = train(own_files, should_stop=stop_at(2), accept_changed_data=True)
    assert (stopped["stopped"], stopped["steps"]) == ("signal", 4)
    assert f"{key} (" in caplog.text
    caplog.clear()
    # Accepted once, it is what the run goes on with.
    assert train(own_files)["steps"] == 6
    assert "other data than the run" not in caplog.text
    history = json.loads((run / "data.json").read_text())["fingerprints"]
    assert [entry[key] != history[0][key] for entry in history] == [False, True]


def test_a_run_from_before_gets_its_fingerprints_with_a_warning(own_files, tmp_path, caplog):
    train(own_files, should_stop=stop_at(2))
    file = tmp_path / "run" / "data.json"
    file.unlink()
    train(own_files, should_stop=stop_at(1))
    assert "began before fingerprints of its data were kept" in caplog.text
    assert json.loads(file.read_text())["fingerprints"] == [OpenedConfig(own_files).fingerprints]
    # The test split decides nothing: a change of it is told, once.
    caplog.clear()
    edit(tmp_path / "test.jsonl")
    for told in (1, 0):
        train(own_files, should_stop=stop_at(1))
        assert caplog.text.count("data.test (12 examples then, 12 now): other data than the run in") == told
        caplog.clear()
    edit(tmp_path / "validation.jsonl")
    with pytest.raises(UserError, match=r"data\.validation"):
        train(own_files)
    for damage in ("{", "[]", '{"fingerprints": [3]}'):
        file.write_text(damage)
        with pytest.raises(UserError, match=r"data\.json: .*fingerprints of data.*restore"):
            train(own_files)


def test_a_run_that_goes_on_next_day_shows_the_same_day(chats, tmp_path, day):
    day(5)
    train(chats, should_stop=stop_at(2))
    day(6)
    assert train(chats)["steps"] == 6
    resolved = load_config(tmp_path / "run" / "config.yaml")
    assert resolved.data.date == "2026-01-05"
    # Whoever opens the run's directory sees its day: evaluation, and generation from its prompts.
    opened = OpenedConfig(resolved, parts=("validation",))
    again = OpenedConfig(chats, parts=("validation",))
    for one, other in zip(opened.examples["validation"], again.examples["validation"], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert opened.tokenizer.decode(opened.examples["validation"][0].tokens).startswith("w5 ")
    prompt = again.tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)
    assert prompt == "w5 w1 : "
    # Another directory has its own day, or one that is asked for; in this one another day is another run.
    fresh = with_overrides(chats, {"run_dir": str(tmp_path / "fresh")})
    assert OpenedConfig(fresh, parts=()).config.data.date == "2026-01-06"
    assert OpenedConfig(with_overrides(fresh, {"data.date": "2025-12-24"}), parts=()).config.data.date == "2025-12-24"
    with pytest.raises(UserError, match=r"data\.date: there '2026-01-05', now '2025-12-24'"):
        train(with_overrides(chats, {"data.date": "2025-12-24"}))


def test_a_run_from_before_shows_the_day_that_it_began_on(chats, tmp_path, day):
    day(6)
    directory = RunDirectory(tmp_path / "run")
    directory.claim(chats)
    begun = datetime.date.fromtimestamp(directory.config_path.stat().st_mtime)
    assert OpenedConfig(chats, parts=()).config.data.date == begun.isoformat()
    directory.journal_path.write_text(json.dumps({"event": "study", "time": 86400.0 * 365}) + "\n")
    assert OpenedConfig(chats, parts=()).config.data.date == datetime.date.fromtimestamp(86400.0 * 365).isoformat()
