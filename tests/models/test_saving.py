"""What is saved beside the weights: transformers reads the same tokenizer from it and stops at the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.models import load_tokenizer, random_model, read_config, save_model, saving
from jaxtune.models.hf_config import decoder_config
from tests.models.overruled import OVERRULED, as_published, byte_level


@pytest.fixture(scope="module")
def model():
    """A tiny decoder of each family asked for."""
    made = {}

    def make(family: str):
        if family not in made:
            sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | dict.fromkeys(
                ("num_attention_heads", "num_key_value_heads"), 2
            )
            config = decoder_config(
                {"model_type": family, "vocab_size": 300, "num_hidden_layers": 1, "head_dim": 8, "eos_token_id": 7}
                | {"bos_token_id": None}
                | sizes
            )
            made[family] = random_model(config, jax.random.key(0))
        return made[family]

    return make


def test_tokenizer_files_go_with_the_weights(model, tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    byte_level(source, "llama", {"eos_token": "</s>"})
    (source / "tokenization_custom.py").write_text("raise SystemExit")
    copied = {name: (source / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for _ in range(2):  # the second time onto itself
        save_model(model("llama"), out, tokenizer_from=source)
        assert {path.name for path in out.iterdir()} == {
            *copied,
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
        assert {name: (out / name).read_bytes() for name in copied} == copied
        source = out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no tokenizer files"):
        save_model(model("llama"), tmp_path / "new", tokenizer_from=tmp_path / "empty")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("model_type", "fields"), OVERRULED[:4])
def test_transformers_own_tokenizer_of_the_directory_gives_the_same_ids(model, tmp_path: Path, model_type, fields):
    from transformers import AutoTokenizer

    text = "in 2024 the ﬁrst"
    expected = byte_level(tmp_path / "source", model_type, fields).encode(text).ids
    save_model(model(model_type), tmp_path / "out", tokenizer_from=tmp_path / "source")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == expected
    assert load_tokenizer(tmp_path / "out")(text)["input_ids"] == expected
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert theirs.eos_token == (fields or {}).get("eos_token")


def test_files_that_say_the_same_in_other_words_stay_as_they_are(model, tmp_path: Path):
    as_published(tmp_path / "source", "qwen2")
    save_model(model("qwen2"), tmp_path / "out", tokenizer_from=tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_a_tokenizer_that_transformers_will_not_read_is_refused_before_writing(model, tmp_path: Path, monkeypatch):
    byte_level(tmp_path / "source", "llama", None)
    monkeypatch.setattr(saving, "_FROM_FILE", "Qwen2Tokenizer")  # as if no class took the file as it is
    with pytest.raises(UserError, match=r"'qwen2': its class for that puts its own normalizer, pre_tokenizer"):
        save_model(model("qwen2"), tmp_path / "out", tokenizer_from=tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_the_end_tokens_of_model_and_tokenizer_are_written(model, tmp_path: Path):
    byte_level(tmp_path / "source", "llama", {"eos_token": "</s>", "bos_token": "<|endoftext|>"})
    save_model(model("llama"), tmp_path / "out", tokenizer_from=tmp_path / "source")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [7, 1]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [7, 1]
    assert read_config(tmp_path / "out").eos_token_ids == (7, 1)
    # A token that the model has no row for is none that it could write.
    (tmp_path / "source" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|beyond|>", "pad_token": "!"})
    )
    (tmp_path / "source" / "added_tokens.json").write_text(json.dumps({"<|beyond|>": 400}))
    save_model(model("llama"), tmp_path / "other", tokenizer_from=tmp_path / "source")
    assert all(token < 300 for token in read_config(tmp_path / "other").eos_token_ids)
