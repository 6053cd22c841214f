"""What a configuration names, opened: once, checked cheaply first, and the same for all variants."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jaxtune.config import load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.training import opened_config as experiment_module
from jaxtune.training.opened_config import OpenedConfig


@pytest.fixture
def config(config_file):
    return load_config(config_file)


def test_all_named_splits_are_opened_and_only_the_asked_ones(config):
    opened = OpenedConfig(config)
    assert {part: len(examples) for part, examples in opened.examples.items()} == {
        "train": 64,
        "validation": 12,
        "test": 12,
    }
    assert dict(opened.model.mesh.shape) == {"trial": 1, "data": 8, "fsdp": 1, "tensor": 1}
    some = OpenedConfig(with_overrides(config, {"data.validation": None}), parts=("validation", "test"))
    assert some.examples.keys() == {"test"}
    assert some.validation_batches is None
    assert some.loss_batches("train") is None
    assert some.evaluator("validation") is None


def test_epochs_become_the_steps_that_hold_them(config):
    epochs = with_overrides(config, {"train.steps": None, "train.epochs": 2.5})
    opened = OpenedConfig(epochs)
    assert (opened.config.train.steps, opened.config.train.epochs) == (math.ceil(2.5 * 64 / 8), None)
    assert opened.given == epochs
    # A variant has steps of its own.
    variant = opened.resolve(with_overrides(epochs, {"train.batch_size": 16}))
    assert variant.train.steps == 10
    batches = opened.batches()
    seen = np.concatenate([next(batches)["example_ids"][:, 0] for _ in range(opened.config.train.steps)])
    batches.close()
    assert sorted(np.bincount(seen).tolist()) == [2] * 32 + [3] * 32


def test_batches_and_start_follow_from_the_seed_alone(config):
    opened = OpenedConfig(config)
    firsts = []
    for seed in (0, 0, 1):
        batches = opened.batches(with_overrides(config, {"train.seed": seed, "optimizer.learning_rate": seed + 1.0}))
        firsts.append(next(batches)["tokens"])
        batches.close()
    assert np.array_equal(firsts[0], firsts[1])
    assert not np.array_equal(firsts[0], firsts[2])


def test_validation_holds_every_example_once_in_the_training_batch_s_shape(config):
    opened = OpenedConfig(config)
    batches = list(opened.validation_batches)
    assert {batch["tokens"].shape for batch in batches} == {(8, 8)}
    ids = np.concatenate([batch["example_ids"][:, 0] for batch in batches])
    assert sorted(ids[ids >= 0].tolist()) == list(range(12))


def test_wrong_input_is_told_before_the_weights_are_read(config, monkeypatch):
    monkeypatch.setattr(experiment_module, "_load", lambda *_: pytest.fail("the weights were read"))
    for key, value, part in (
        ("parallel.data", 3, "does not fit"),
        ("train.sequence_length", 65, "64 positions"),
        ("data.train", "nowhere.jsonl", "nowhere.jsonl"),
        ("data.test.limit", 0, "greater than 0"),
    ):
        with pytest.raises(UserError, match=part):
            OpenedConfig(with_overrides(config, {key: value}))


def test_random_weights_follow_from_the_seed_and_read_no_file(config, tiny_model, tmp_path):
    import shutil

    only = tmp_path / "only"
    shutil.copytree(tiny_model, only, ignore=shutil.ignore_patterns("*.safetensors"))
    changes = {"model.initialize": "random", "model.path": str(only), "data.validation": None, "data.test": None}
    first, again, other = (
        OpenedConfig(with_overrides(config, {**changes, "train.seed": seed})).model.embed.table[...]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_model_names_the_end_token_of_a_tokenizer_that_lies_elsewhere(config, tiny_model, tmp_path, caplog):
    import json
    import shutil

    only, unnamed = tmp_path / "only", tmp_path / "unnamed"
    only.mkdir()
    shutil.copy(tiny_model / "tokenizer.json", only)
    changes = {"model.tokenizer": str(only), "data.validation": None, "data.test": None}
    opened = OpenedConfig(with_overrides(config, changes))
    assert "answers end with '</s>' (2)" in caplog.text
    assert all(example.tokens[-1] == 2 for example in opened.examples["train"])
    assert 2 in opened.generator.eos_ids
    # Where nobody names one, nothing ends an answer, and that is said.
    shutil.copytree(tiny_model, unnamed, ignore=shutil.ignore_patterns("generation_config.json"))
    fields = json.loads((unnamed / "config.json").read_text())
    (unnamed / "config.json").write_text(json.dumps(fields | {"eos_token_id": None}))
    caplog.clear()
    opened = OpenedConfig(with_overrides(config, {**changes, "model.path": str(unnamed)}))
    assert "nothing ends a completion" in caplog.text
    assert all(example.tokens[-1] != 2 for example in opened.examples["train"])


def test_the_first_examples_of_a_shuffle_are_kept_and_absent_answers_left_out(config, tmp_path):
    """Fewer are among more, another seed keeps others, and only questions with an answer stay where that is asked."""

    def kept(**source):
        changed = {f"data.validation.{key}": value for key, value in source.items()}
        opened = OpenedConfig(with_overrides(config, changed), parts=("validation",))
        return [example.index for example in opened.examples["validation"]]

    few, more, others = kept(examples=4), kept(examples=9), kept(examples=9, examples_seed=1)
    assert more[:4] == few
    assert len(set(more)) == 9
    assert more != sorted(more)
    assert set(others) != set(more)
    with pytest.raises(UserError, match=r"data\.validation\.examples: 13 is above the 12 examples"):
        kept(examples=13)
    with pytest.raises(UserError, match=r"data\.validation\.absent: nothing tells .* data\.explode"):
        kept(absent=False)
    rows = [{"text": f"w{number}", "attributes": {"w1": "w2"} if number % 3 else {}} for number in range(9)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "schema.json").write_text('["w1"]')
    explode = {"field": "attributes", "schema_path": str(tmp_path / "schema.json"), "absent": "w0"}
    source = {"path": str(tmp_path / "documents.jsonl"), "absent": False}
    templates = {"data.prompt": "{text} : {attribute}", "data.completion": "{value}"}
    asked = with_overrides(config, {**templates, "data.explode": explode, "data.validation": source})
    present = OpenedConfig(asked, parts=("validation",)).examples["validation"]
    assert [example.fields["text"] for example in present] == [f"w{number}" for number in (1, 2, 4, 5, 7, 8)]
