"""Tokenizers whose ``tokenizer.json`` says something else than transformers' class for the model."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def as_published(directory: Path, model_type: str) -> Tokenizer:
    """Files as Qwen publishes them: what they say and what the class builds differ in words alone."""
    tokenizer = byte_level(directory, model_type, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"})
    tokenizer.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), bytes_])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def byte_level(directory: Path, model_type: str, fields: dict[str, str] | None) -> Tokenizer:
    """Files whose ``tokenizer.json`` joins three digits, under a model type whose class takes them one by one."""
    directory.mkdir()
    pieces = ["<|endoftext|>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "20", "202"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("2", "0"), ("20", "2")]))
    tokenizer.normalizer = normalizers.NFKC()
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "</s>", "<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if fields is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return tokenizer


OVERRULED = [
    ("qwen2", None),
    ("qwen2", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}),
    ("qwen3", {"eos_token": "</s>"}),
    ("llama", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}),
    ("gemma2", {"eos_token": "</s>"}),
]
