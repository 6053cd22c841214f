from __future__ import annotations

import logging

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune.config.data_section import DataConfig
from jaxtune.data import encoding
from jaxtune.data.encoding import encode_continuations, encode_prompts, special_id
from jaxtune.data.examples import make_examples

PAIRS = [
    ("the shoe:", " blue"),
    ("Answer: ", "blue"),
    ("Answer", ": blue"),
    ("what is it?\n", "\nred"),
    ("the sh", "oe is blue"),
    ("the shoe", ", blue"),
]


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    return encode_prompts(tokenizer, [prompt])[0], encode_continuations(tokenizer, [completion])[completion]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
@pytest.mark.parametrize("kind", ["byte", "dummy_prefix"])
def test_pieces_decode_to_the_text(kind: str, prompt: str, completion: str, request: pytest.FixtureRequest):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    head, tail = encode(tokenizer, prompt, completion)
    # The prompt is what a plain call gives, which is what generation starts from.
    assert head == tokenizer(prompt)["input_ids"]
    pieces = "".join(tokenizer.convert_ids_to_tokens(head[1:] + tail))
    if kind == "byte":
        assert tokenizer.decode(head[1:] + tail) == prompt + completion
    else:
        # One space in front of the whole, none at the boundary.
        assert pieces == "▁" + (prompt + completion).replace(" ", "▁")


def test_a_token_may_not_grow_over_the_boundary(byte_tokenizer: PreTrainedTokenizerFast):
    # As one text, " blue" is a single token and the prompt's own ids are no prefix: the case that must not happen.
    joined = byte_tokenizer("Answer: blue")["input_ids"]
    head, tail = encode(byte_tokenizer, "Answer: ", "blue")
    assert joined[: len(head)] != head
    assert byte_tokenizer.decode(tail) == "blue"


def test_a_continuation_gets_no_dummy_prefix(dummy_prefix_tokenizer: PreTrainedTokenizerFast):
    joined = dummy_prefix_tokenizer("the shoe: blue")["input_ids"]
    head, tail = encode(dummy_prefix_tokenizer, "the shoe:", " blue")
    assert head + tail == joined
    alone = dummy_prefix_tokenizer(" blue", add_special_tokens=False)["input_ids"]
    assert len(alone) > len(tail)


def test_words(word_tokenizer: PreTrainedTokenizerFast):
    head, tail = encode(word_tokenizer, "the shoe is", "blue")
    assert word_tokenizer.convert_ids_to_tokens(head + tail) == ["the", "shoe", "is", "blue"]
    assert special_id(word_tokenizer, "eos_token") is None


def test_an_appended_end_token_is_taken_off(byte_tokenizer: PreTrainedTokenizerFast):
    closing = PreTrainedTokenizerFast(
        tokenizer_object=type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
    )
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert closing("the shoe")["input_ids"][-1] == 1
    assert encode_prompts(closing, ["the shoe", ""]) == encode_prompts(byte_tokenizer, ["the shoe", ""])


def test_a_special_token_in_front_stands_once(
    byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
):
    encoding._tell_of_repetition.cache_clear()
    with caplog.at_level(logging.WARNING):
        written = encode_prompts(byte_tokenizer, ["<s>the shoe", "the<s> shoe", "<s><s>a"])
        config = DataConfig(train="rows.jsonl", prompt="<s>{text}:", completion=" blue")
        (example,) = make_examples([{"text": "the shoe"}], config, byte_tokenizer)
        (text,) = make_examples([{"text": "the"}], DataConfig(train="x", completion="<s>{text}"), byte_tokenizer)
    assert [ids.count(0) for ids in written] == [1, 2, 2]
    assert written[0] == byte_tokenizer("the shoe")["input_ids"]
    assert example.tokens.tolist() == [*byte_tokenizer("the shoe: blue")["input_ids"], 1]
    assert example.prompt.tolist() == byte_tokenizer("the shoe:")["input_ids"]
    assert example.weights.tolist() == [0] * example.prompt_length + [1] * 2
    assert text.tokens.tolist() == [*byte_tokenizer("the")["input_ids"], 1]
    assert text.weights.tolist() == [0] + [1] * (len(text.tokens) - 1)
    assert caplog.text.count("'<s>', which the tokenizer writes itself") == 1
    # A chat template writes its special tokens itself: what stands twice there was asked for.
    assert encode_prompts(byte_tokenizer, ["<s><s>a"], rendered=True)[0].count(0) == 2


def test_nothing_to_encode(byte_tokenizer: PreTrainedTokenizerFast):
    assert encode_prompts(byte_tokenizer, []) == []
    assert encode_continuations(byte_tokenizer, []) == {}


def test_a_real_tokenizer(babyllama):
    tokenizer = AutoTokenizer.from_pretrained(str(babyllama))
    for prompt, completion in PAIRS:
        head, tail = encode(tokenizer, prompt, completion)
        assert head + tail == tokenizer(prompt + completion)["input_ids"]
