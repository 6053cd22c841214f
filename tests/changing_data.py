"""The tiny task over files that change, and as conversations whose template shows the date."""

from __future__ import annotations

import datetime
import json
import shutil

import pytest
from transformers.utils import chat_template_utils

from jaxtune.config import load_config, with_overrides
from jaxtune.models import load_tokenizer
from jaxtune.training import template_date


@pytest.fixture
def own_files(config_file, rows, tmp_path):
    """The tiny task over files of its own: six steps, a checkpoint after every second."""
    changes = {"train.steps": 6, "train.checkpoint_every": 2}
    for part in ("train", "validation", "test"):
        shutil.copy(rows / f"{part}.jsonl", tmp_path)
        changes[f"data.{part}.path"] = str(tmp_path / f"{part}.jsonl")
    return with_overrides(load_config(config_file), changes)


def edit(file):
    """Another answer in the first row; the ids have other values and the same lengths."""
    first, *rest = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    file.write_text(json.dumps({**row, "answer": row["answer"].replace("w3", "w39")}) + "\n" + "".join(rest))


# The day stands in every prompt, as a word of the tiny tokenizer.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'w' ~ (strftime_now('%d') | int) ~ ' ' ~ m['content'] }}"
    " : {% else %}{{ m['content'] ~ ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chats(own_files, tiny_model, tmp_path):
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
    return with_overrides(own_files, {**changes, "model.path": str(model)})


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
