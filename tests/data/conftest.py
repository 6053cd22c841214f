"""Tiny tokenizers of the kinds that differ: byte-level pieces, words, and SentencePiece's dummy prefix."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the shoe is blue and the shirt is red",
    "what is the colour of the shoe? blue. and of the shirt? red.",
    "Answer: blue\nAnswer: red\nQuestion: what is it?\n",
    "user assistant system hello there, how are you today? I am fine, thank you.",
] * 20


def _byte_level(*, merges: int, special: list[str], begins_with: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if begins_with is not None:
        number = tokenizer.token_to_id(begins_with)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins_with} $A", special_tokens=[(begins_with, number)]
        )
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a token in front and one at the end, as Llama 3 has; no padding token."""
    tokenizer = _byte_level(merges=120, special=["<s>", "</s>"], begins_with="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of ChatML; no padding token, no chat template (tests set theirs)."""
    tokenizer = _byte_level(merges=120, special=["<|im_start|>", "<|im_end|>"], begins_with=None)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def dummy_prefix_tokenizer() -> PreTrainedTokenizerFast:
    """BPE that writes a space in front of every text, as SentencePiece does for Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words split at spaces, no special token but the unknown one."""
    words = ["<unk>", *sorted({word for text in CORPUS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
