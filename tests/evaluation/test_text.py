from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtune.evaluation.text import answer_texts, stop_token_ids


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and three merged tokens: one holds a line break among other characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "ab", "Ċb", "dĊb"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("Ċ", "b"), ("d", "Ċb")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<\n>")


def test_tokens_that_hold_the_stop_string(tokenizer):
    ids = stop_token_ids(tokenizer, "\n")
    # The end-of-text token's name holds one too, but it has no text.
    assert {tokenizer.convert_ids_to_tokens(token) for token in ids} == {"Ċ", "Ċb", "dĊb"}
    assert {tokenizer.convert_ids_to_tokens(token) for token in stop_token_ids(tokenizer, "ab")} == {"ab"}
    assert stop_token_ids(tokenizer, None) == frozenset() == stop_token_ids(tokenizer, "")


@pytest.mark.parametrize("text", ["red\nblue", "red", "\n", "red\nb\nc", "red d\nb"])
def test_answers_are_cut_at_the_stop_string(tokenizer, text):
    answers = [tokenizer.encode(text), [*tokenizer.encode("ab"), tokenizer.eos_token_id]]
    assert answer_texts(tokenizer, answers, "\n") == [text.split("\n")[0], "ab"]
    assert answer_texts(tokenizer, answers) == [text, "ab"]
    # A string spread over tokens is found in the text.
    assert answer_texts(tokenizer, [tokenizer.encode("bred")], "red") == ["b"]
