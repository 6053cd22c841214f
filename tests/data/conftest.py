"""Tiny tokenizers of the kinds that differ: byte-level pieces, words, characters, and SentencePiece's dummy prefix."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

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


class PairTokenizer(PreTrainedTokenizer):
    """In Python, so without offsets: characters, and pairs of the letters a, b and a space."""

    def __init__(self, **options):
        letters = [chr(code) for code in range(32, 127)]
        tokens = ["<unk>", "<s>", "</s>", "\n", *letters, *(first + second for first in "ab " for second in "ab ")]
        self._ids = {token: number for number, token in enumerate(tokens)}
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options)

    vocab_size = property(lambda self: len(self._ids))

    def get_vocab(self):
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text, **_):
        return re.findall(r"[ab ]{2}|.|\n", text)

    def _convert_token_to_id(self, token):
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self._ids)[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.fixture(scope="session")
def pair_tokenizer() -> PreTrainedTokenizer:
    """A tokenizer in Python."""
    return PairTokenizer()


def _sentence_pieces(scheme: str, **special: bool) -> PreTrainedTokenizerFast:
    """BPE over text whose spaces are ``▁``, written in front by a pre-tokenizer; bytes where a letter is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.add_tokens([AddedToken(name, special=True, **special) for name in ("</s>", "<|user|>", "<|assistant|>")])
    return wrapped


@pytest.fixture(scope="session")
def any_tokenizer(
    request: pytest.FixtureRequest,
) -> Callable[[str], PreTrainedTokenizer | PreTrainedTokenizerFast]:
    """Gives the tokenizer of a kind."""
    own = ("byte", "chat", "dummy_prefix", "word", "pair")
    kinds = {
        **{name: request.getfixturevalue(f"{name}_tokenizer") for name in own},
        **{f"metaspace_{scheme}": _sentence_pieces(scheme) for scheme in ("first", "always", "never")},
        # Phi's special tokens take in the spaces behind them, XLNet's the spaces in front.
        "right_strip": _sentence_pieces("first", rstrip=True),
        "left_strip": _sentence_pieces("first", lstrip=True),
    }
    return kinds.__getitem__
