"""Tokenizers as they are read: with few files, without torch, without running anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxtune.errors import UserError
from jaxtune.models.tokenizer import load_tokenizer
from tests.models.overruled import OVERRULED, as_published, byte_level


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """``tokenizer.json`` of words, which puts ``<s>`` first, and a ``tokenizer_config.json`` without padding token."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "ball": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": template}))
    return tmp_path


def test_ids_special_tokens_and_template(directory: Path) -> None:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    tokenizer = load_tokenizer(directory)
    assert tokenizer("red ball")["input_ids"] == [1, 3, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False) == "red"
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files


def test_tokenizer_json_alone(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    assert load_tokenizer(directory)("ball red")["input_ids"] == [1, 4, 3]


def test_the_configuration_names_the_end_token_where_the_tokenizer_does_not(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = json.loads((directory / "tokenizer_config.json").read_text())
    named, unnamed = json.dumps(fields), json.dumps({**fields, "eos_token": None})
    for tokenizer_config, config, expected in (
        (None, {"eos_token_id": 2}, "</s>"),
        (None, {"eos_token_id": [4, 2]}, "ball"),
        (unnamed, {"eos_token_id": 2}, "</s>"),
        (unnamed, {"text_config": {"eos_token_id": 3}}, "red"),
        (unnamed, {"eos_token_id": 99}, None),
        (None, {}, None),
        (named, {"eos_token_id": 4}, "</s>"),
    ):
        (directory / "tokenizer_config.json").unlink(missing_ok=True)
        if tokenizer_config is not None:
            (directory / "tokenizer_config.json").write_text(tokenizer_config)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        caplog.clear()
        assert load_tokenizer(directory).eos_token == expected
        told = any("answers end with" in record.getMessage() for record in caplog.records)
        assert told == (expected is not None and tokenizer_config != named)


@pytest.mark.parametrize(("model_type", "fields"), OVERRULED)
def test_the_file_counts_and_not_the_class(tmp_path: Path, model_type: str, fields: dict[str, str] | None) -> None:
    from transformers import AutoTokenizer

    text = "in 2024 the ﬁrst"
    expected = byte_level(tmp_path / "model", model_type, fields).encode(text)
    assert "202" in expected.tokens
    ours = load_tokenizer(tmp_path / "model")
    assert ours(text)["input_ids"] == expected.ids
    assert ours.decode(expected.ids) == "in 2024 the first"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs(text)["input_ids"] != expected.ids  # else there is nothing to mend here


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_file_that_says_the_same_in_other_words_is_left_to_its_class(tmp_path: Path, model_type: str, caplog) -> None:
    text = "in 2024 the first"
    expected = as_published(tmp_path / "model", model_type).encode(text).ids
    ours = load_tokenizer(tmp_path / "model")
    assert type(ours).__name__ == "Qwen2Tokenizer"
    assert ours(text)["input_ids"] == expected
    assert not caplog.records


def test_pretrained(babyllama: Path) -> None:
    tokenizer = load_tokenizer(babyllama)
    assert tokenizer("Once")["input_ids"] == [1, 3, 34, 9, 22, 4]
    assert tokenizer.decode(tokenizer("Once upon")["input_ids"], skip_special_tokens=True) == "Once upon"
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_the_class_that_adds_nothing_is_not_looked_for(directory: Path, monkeypatch: pytest.MonkeyPatch, name) -> None:
    """What looks for it imports torch wherever it is installed, which takes longer than all else at a start."""
    import transformers

    fields = json.loads((directory / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    monkeypatch.setattr(transformers, "AutoTokenizer", None)
    ours = load_tokenizer(directory)
    assert type(ours) is type(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("red ball")["input_ids"] == theirs("red ball")["input_ids"]


def test_code_of_a_checkpoint_is_not_run(directory: Path) -> None:
    trap = directory / "trap"
    (directory / "tokenization_custom.py").write_text(f"open({str(trap)!r}, 'w')\nclass Custom: pass\n")
    fields = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["tokenization_custom.Custom", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(directory)
    assert not trap.exists()


def test_what_is_no_tokenizer(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read") as error:
        load_tokenizer(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"there are no tokenizer files \(tokenizer\.json, tokenizer_config\.json"):
        load_tokenizer(empty)
    with pytest.raises(UserError, match="there is no directory"):
        load_tokenizer(tmp_path / "absent")


def test_without_torch(directory: Path, tmp_path: Path) -> None:
    """A base install has no torch: here a finder says so."""
    code = (
        "import importlib.abc, sys\n"
        "class NoTorch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from jaxtune.models.tokenizer import load_tokenizer\n"
        f"print(load_tokenizer({str(directory)!r})('red ball')['input_ids'], 'torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[1, 3, 4] False", done.stderr
