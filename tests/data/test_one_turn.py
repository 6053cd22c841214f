"""``data.chat``: prompt and completion as one turn of the model's chat template, beside transformers' own rendering."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jaxtune.config.data_section import DataConfig
from jaxtune.config.loading import load_config
from jaxtune.data.chat import chat_prompt
from jaxtune.data.examples import Example, make_examples
from jaxtune.data.messages import one_turn
from jaxtune.errors import UserError
from tests.data.test_chat import CHATML, PLAIN, TAGGED, learnt, with_template

ROWS = [
    {"text": "the shoe is blue.", "attribute": "colour", "value": "blue"},
    {"text": "the shirt", "attribute": "brand", "value": "n/a"},
]
TEMPLATES = {"prompt": "{text}\n{attribute}:", "completion": "{value}"}


def examples(tokenizer: PreTrainedTokenizerFast, rows: list, **options) -> list[Example]:
    config = DataConfig(train="rows.jsonl", chat=True, **{**TEMPLATES, **options})
    return list(make_examples(rows, config, tokenizer))


@pytest.mark.parametrize("template", [CHATML, TAGGED, PLAIN], ids=["chatml", "tagged", "plain"])
def test_the_ids_are_those_of_the_conversation(chat_tokenizer: PreTrainedTokenizerFast, template: str):
    tokenizer = with_template(chat_tokenizer, template)
    for row, example in zip(ROWS, examples(tokenizer, ROWS), strict=True):
        user = {"role": "user", "content": f"{row['text']}\n{row['attribute']}:"}
        talk = [user, {"role": "assistant", "content": row["value"]}]
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(talk, return_dict=False)
        assert example.prompt.tolist() == prompt, "what evaluation generates from"
        assert tokenizer.decode(example.tokens) == tokenizer.decode(whole)
        assert learnt(tokenizer, example) == [f"{row['value']}\n" if template is PLAIN else f"{row['value']}<|im_end|>"]
        assert example.completion == row["value"]
        assert example.fields["attribute"] == row["attribute"]


@given(question=st.text("ab é?{}<|\n", min_size=1, max_size=20), answer=st.text("ab é.", min_size=1, max_size=10))
def test_a_turn_is_the_conversation_of_messages(chat_tokenizer: PreTrainedTokenizerFast, question: str, answer: str):
    """The same text, ids and weights as rows that hold the two as messages."""
    tokenizer = with_template(chat_tokenizer, CHATML)
    if not answer.strip():
        return
    row = {"text": question, "value": answer}
    (turn,) = examples(tokenizer, [row], prompt="{text}")
    talk = {"talk": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    (told,) = make_examples([talk], DataConfig(train="rows.jsonl", messages="talk"), tokenizer)
    np.testing.assert_array_equal(turn.tokens, told.tokens)
    np.testing.assert_array_equal(turn.weights, told.weights)
    np.testing.assert_array_equal(turn.prompt, told.prompt)


def test_a_prompt_of_its_own_is_a_users_turn(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = with_template(chat_tokenizer, CHATML)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert chat_prompt(one_turn("hello"), tokenizer, "prompt 1", key="data.chat") == expected


def test_a_long_turn_that_is_cut_loses_its_end_as_chats_do(chat_tokenizer: PreTrainedTokenizerFast):
    tokenizer = with_template(chat_tokenizer, CHATML)
    (whole,) = examples(tokenizer, ROWS[:1])
    config = DataConfig(train="rows.jsonl", chat=True, too_long="truncate", **TEMPLATES)
    (cut,) = make_examples(ROWS[:1], config, tokenizer, sequence_length=len(whole.tokens) - 3)
    assert cut.tokens.tolist() == whole.tokens[:-2].tolist()
    assert cut.prompt.tolist() == whole.prompt.tolist()


def test_white_space_in_front_of_answers_is_told(chat_tokenizer: PreTrainedTokenizerFast, caplog):
    tokenizer = with_template(chat_tokenizer, CHATML)
    with caplog.at_level(logging.WARNING):
        examples(tokenizer, ROWS)
        assert not caplog.messages
        examples(tokenizer, ROWS, completion=" {value}")
    assert any(message.startswith("data.completion: begins with white space") for message in caplog.messages)
    trimming = with_template(tokenizer, CHATML.replace("m['content']", "m['content'].strip()"))
    caplog.clear()
    examples(trimming, ROWS, completion=" {value}")
    assert not caplog.messages


def test_a_model_without_a_template_is_refused(chat_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(UserError, match=r"no chat template .*without data\.chat"):
        examples(with_template(chat_tokenizer, None), ROWS)
    with pytest.raises(UserError, match="no chat template"):
        chat_prompt(one_turn("hello"), with_template(chat_tokenizer, None), "prompt 1", key="data.chat")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("messages: talk\n  chat: true", "config.yaml:4: data.chat: puts prompt and completion"),
        ("completion: '{a}'\n  chat: true", "config.yaml:4: data.chat: needs data.prompt"),
        ("completion: '{a}'\n  prompt: '{b}'\n  date: 2026-01-31", "date does nothing without messages or chat"),
    ],
)
def test_refused(tmp_path, data: str, message: str):
    file = tmp_path / "config.yaml"
    file.write_text(f"data:\n  train: rows.jsonl\n  {data}\nmodel: {{path: 'jaxtune:nano'}}\ntrain: {{steps: 1}}\n")
    with pytest.raises(UserError, match=message):
        load_config(file)


def test_a_day_may_be_given_with_chat():
    assert DataConfig(train="rows.jsonl", chat=True, date="2026-01-31", **TEMPLATES).templated
