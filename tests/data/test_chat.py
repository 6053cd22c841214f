from __future__ import annotations

import copy

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxtune.config.data_section import DataConfig
from jaxtune.data.examples import Example, make_examples
from jaxtune.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text, with blocks that say what is generated.
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No special tokens at all, and a boundary that a token would grow over: "Assistant: " and "blue".
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Earlier answers are rendered shorter once the conversation goes on, as reasoning models' templates do.
UNSTABLE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ 'hello' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)

TALK = [
    {"role": "system", "content": "you are fine"},
    {"role": "user", "content": "what is the colour of the shoe?"},
    {"role": "assistant", "content": "blue."},
    {"role": "user", "content": "and of the shirt?"},
    {"role": "assistant", "content": "red. how are you?"},
]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def examples(tokenizer: PreTrainedTokenizerFast, talks: list, **options) -> list[Example]:
    config = DataConfig(train="rows.jsonl", messages="talk", **options)
    return list(make_examples([{"talk": talk} for talk in talks], config, tokenizer))


def learnt(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The text of each run of weighted tokens."""
    edges = np.flatnonzero(np.diff(np.r_[0, example.weights, 0]))
    return [tokenizer.decode(example.tokens[start:stop]) for start, stop in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_loss_on_each_answer_and_its_end(chat_tokenizer: PreTrainedTokenizerFast, template: str):
    tokenizer = with_template(chat_tokenizer, template)
    assert tokenizer.pad_token is None
    (example,) = examples(tokenizer, [TALK])
    assert learnt(tokenizer, example) == ["blue.<|im_end|>", "red. how are you?<|im_end|>"]
    # Piece by piece gives what the whole text gives, with this template.
    assert example.tokens.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)
    prompt = tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)
    assert example.tokens[: example.prompt_length].tolist() == prompt
    assert example.completion == "red. how are you?"


def test_both_ways_agree_with_transformers_own_mask(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = with_template(chat_tokenizer, TAGGED)
    mask = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    tagged, untagged = examples(tokenizer, [TALK]), examples(with_template(chat_tokenizer, CHATML), [TALK])
    assert tagged[0].weights.tolist() == untagged[0].weights.tolist() == mask


def test_boundary_within_what_would_be_one_token(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = with_template(chat_tokenizer, PLAIN)
    (example,) = examples(tokenizer, [TALK[1:3]])
    prompt = tokenizer.apply_chat_template(TALK[1:2], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(TALK[1:3], return_dict=False)
    assert whole[: len(prompt)] != prompt
    assert example.tokens[: example.prompt_length].tolist() == prompt
    assert learnt(tokenizer, example) == ["blue.\n"]


def test_loss_on_all(chat_tokenizer: PreTrainedTokenizerFast):
    (example,) = examples(with_template(chat_tokenizer, CHATML), [TALK], loss_on="all")
    assert example.weights[0] == 0
    assert example.weights[1:].all()


def test_records_of_lists_are_messages(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = with_template(chat_tokenizer, CHATML)
    columns = {name: [message[name] for message in TALK] for name in ("role", "content")}
    as_rows, as_columns = examples(tokenizer, [TALK, columns])
    assert as_rows.tokens.tolist() == as_columns.tokens.tolist()


def test_unstable_template(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = with_template(chat_tokenizer, UNSTABLE)
    with pytest.raises(UserError, match="row 2: the chat template renders message 3 differently"):
        examples(tokenizer, [TALK[:3], TALK])
    (example,) = examples(tokenizer, [TALK[:3]])
    assert learnt(tokenizer, example) == ["helloblue.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (None, TALK, "no chat template"),
        (REFUSES, TALK, "row 1: .* refuses the messages: System role not supported"),
        (CHATML, TALK[:2], "no assistant message"),
        (CHATML, TALK[2:], "begins with the assistant"),
        (CHATML, [], "is no list of messages"),
        (CHATML, "hello", "is no list of messages"),
        (CHATML, {"role": ["user"], "content": 5}, "is no list of messages"),
        (CHATML, {"role": ["user"], "content": ["hello", "blue"]}, "is no list of messages"),
        (CHATML, [{"role": "user"}], "message 1 of 'talk' has no text under 'content'"),
        (CHATML, [*TALK[:2], {"role": "assistant", "content": " "}], "message 3 of 'talk' is an empty completion"),
    ],
)
def test_errors(chat_tokenizer: PreTrainedTokenizerFast, template: str | None, talk: object, message: str):
    with pytest.raises(UserError, match=message):
        examples(with_template(chat_tokenizer, template), [talk])


def test_missing_field(chat_tokenizer: PreTrainedTokenizerFast):
    config = DataConfig(train="rows.jsonl", messages="talks")
    with pytest.raises(UserError, match=r"row 1 has no field 'talks' .*did you mean 'talk'"):
        make_examples([{"talk": TALK}], config, with_template(chat_tokenizer, CHATML))
