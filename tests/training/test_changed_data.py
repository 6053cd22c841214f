"""Data that change under a run: told before anything is trained, and gone on with on purpose only."""

from __future__ import annotations

import datetime
import json
import shutil

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from jaxtune.config import load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.models import load_tokenizer
from jaxtune.training import template_date
from jaxtune.training.experiment import Experiment
from jaxtune.training.preflight import preflight
from jaxtune.training.run import train
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.trained import trained


@pytest.fixture
def config(config_file, rows, tmp_path):
    """Six steps over files of its own."""
    changes = {"train.steps": 6, "train.checkpoint_every": 2}
    for part in ("train", "validation", "test"):
        shutil.copy(rows / f"{part}.jsonl", tmp_path)
        changes[f"data.{part}.path"] = str(tmp_path / f"{part}.jsonl")
    return with_overrides(load_config(config_file), changes)


def stop_at(step):
    """Stops a run after so many steps."""
    asked = iter([False] * (step - 1) + [True])
    return lambda: next(asked)


def edit(file):
    """Another answer in the first row; the ids have other values and the same lengths."""
    first, *rest = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    file.write_text(json.dumps({**row, "answer": row["answer"].replace("w3", "w39")}) + "\n" + "".join(rest))


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize("part", ["validation", "train"])
def test_a_changed_split_is_refused_and_accepted_on_purpose(config, tmp_path, caplog, part):
    run, key = tmp_path / "run", f"data.{part}"
    train(config, should_stop=stop_at(2))
    before = contents(run)
    edit(tmp_path / f"{part}.jsonl")
    for call in (train, lambda config: preflight(config, directory=RunDirectory(run))):
        with pytest.raises(UserError, match=rf"^{key} \(.*\): other data than the run in .*--accept-changed-data$"):
            call(config)
    assert contents(run) == before
    # What is only looked at is never refused.
    assert trained(Experiment(config)).origin.endswith("at step 2")
    stopped = train(config, should_stop=stop_at(2), accept_changed_data=True)
    assert (stopped["stopped"], stopped["steps"]) == ("signal", 4)
    assert f"{key} (" in caplog.text
    caplog.clear()
    # Accepted once, it is what the run goes on with.
    assert train(config)["steps"] == 6
    assert not caplog.records
    history = json.loads((run / "data.json").read_text())["fingerprints"]
    assert [entry[key] != history[0][key] for entry in history] == [False, True]


def test_a_run_from_before_gets_its_fingerprints_with_a_warning(config, tmp_path, caplog):
    train(config, should_stop=stop_at(2))
    file = tmp_path / "run" / "data.json"
    file.unlink()
    train(config, should_stop=stop_at(2))
    assert "began before fingerprints of its data were kept" in caplog.text
    assert json.loads(file.read_text())["fingerprints"] == [Experiment(config).fingerprints]
    # The test split decides nothing: a change of it is told, once.
    caplog.clear()
    edit(tmp_path / "test.jsonl")
    for told in (1, 0):
        train(config, should_stop=stop_at(1))
        assert caplog.text.count("data.test (12 examples then, 12 now): other data than the run in") == told
        caplog.clear()
    edit(tmp_path / "validation.jsonl")
    with pytest.raises(UserError, match=r"data\.validation"):
        train(config)
    for damage in ("{", "[]", '{"fingerprints": [3]}'):
        file.write_text(damage)
        with pytest.raises(UserError, match=r"data\.json: .*fingerprints of data.*restore"):
            train(config)


# The day stands in every prompt, as a word of the tiny tokenizer.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'w' ~ (strftime_now('%d') | int) ~ ' ' ~ m['content'] }}"
    " : {% else %}{{ m['content'] ~ ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chats(config, tiny_model, tmp_path):
    """The same task as conversations, with a template that shows the date."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    for part in ("train", "validation", "test"):
        file = tmp_path / f"{part}.jsonl"
        with file.with_name(f"talk-{part}.jsonl").open("w") as talks:
            for row in map(json.loads, file.read_text().splitlines()):
                turns = ({"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]})
                talks.write(json.dumps({"talk": turns}) + "\n")
    changes = {f"data.{part}.path": str(tmp_path / f"talk-{part}.jsonl") for part in ("train", "validation", "test")}
    changes |= {"data.prompt": None, "data.completion": None, "data.messages": "talk", "train.sequence_length": 12}
    return with_overrides(config, {**changes, "model.path": str(model)})


@pytest.fixture
def day(monkeypatch):
    """Sets the clock that templates and new runs see to a day of a month."""

    def turn(number):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 1, number)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(template_date, "today", lambda: datetime.date(2026, 1, number))

    return turn


def test_a_run_that_goes_on_next_day_shows_the_same_day(chats, tmp_path, day):
    day(5)
    train(chats, should_stop=stop_at(2))
    day(6)
    assert train(chats)["steps"] == 6
    resolved = load_config(tmp_path / "run" / "config.yaml")
    assert resolved.data.date == "2026-01-05"
    # Whoever opens the run's directory sees its day: evaluation, and generation from its prompts.
    opened = Experiment(resolved, parts=("validation",))
    again = Experiment(chats, parts=("validation",))
    for one, other in zip(opened.examples["validation"], again.examples["validation"], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert opened.tokenizer.decode(opened.examples["validation"][0].tokens).startswith("w5 ")
    prompt = again.tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)
    assert prompt == "w5 w1 : "
    # Another directory has its own day, or one that is asked for; in this one another day is another run.
    fresh = with_overrides(chats, {"run_dir": str(tmp_path / "fresh")})
    assert Experiment(fresh, parts=()).config.data.date == "2026-01-06"
    assert Experiment(with_overrides(fresh, {"data.date": "2025-12-24"}), parts=()).config.data.date == "2025-12-24"
    with pytest.raises(UserError, match=r"data\.date: there '2026-01-05', now '2025-12-24'"):
        train(with_overrides(chats, {"data.date": "2025-12-24"}))


def test_a_run_from_before_shows_the_day_that_it_began_on(chats, tmp_path, day):
    day(6)
    directory = RunDirectory(tmp_path / "run")
    directory.claim(chats)
    begun = datetime.date.fromtimestamp(directory.config_path.stat().st_mtime)
    assert Experiment(chats, parts=()).config.data.date == begun.isoformat()
    directory.journal_path.write_text(json.dumps({"event": "study", "time": 86400.0 * 365}) + "\n")
    assert Experiment(chats, parts=()).config.data.date == datetime.date.fromtimestamp(86400.0 * 365).isoformat()
