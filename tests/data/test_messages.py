"""Chat rows of every kind that is stored: null-filled, with tools, with parts; and the files that generate reads."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from jaxtune.config.data_section import DataConfig, SourceConfig
from jaxtune.data.examples import Example, make_examples
from jaxtune.data.messages import read_conversations
from jaxtune.data.sources import open_source
from jaxtune.errors import UserError

END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# Reads all keys of a message, as templates with tools do.
NAMED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{% if m.name is defined %}{{ ' name=' ~ m.name }}{% endif %}"
    "{{ '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
) + END
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if 'tool_calls' in m %}{% for call in m.tool_calls %}{{ call.function.name + '(' }}ARGUMENTS{{ ')' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
) + END
ITEMS = CALLS.replace(
    "ARGUMENTS", "{% for k, v in call.function.arguments | items %}{{ k + '=' + (v | tojson) }}{% endfor %}"
)
AS_JSON = CALLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}")
AS_TEXT = CALLS.replace("ARGUMENTS", "{{ call.function.arguments }}")
# Content is text, and nothing else.
TEXT_ONLY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + END
PRINTED = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}" + END

TOOL = {"type": "function", "function": {"name": "shop", "parameters": {"type": "object", "properties": {"a": {}}}}}
ARGUMENTS = {"what": "the shoe", "unit": None, "count": 2}


def calling(arguments: object) -> list[dict]:
    return [
        {"role": "user", "content": "what is the colour of the shoe?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "name": "f", "content": "blue"},
        {"role": "assistant", "content": "blue."},
    ]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def examples(tokenizer: PreTrainedTokenizerFast, rows: object, template: str) -> list[Example]:
    config = DataConfig(train="rows.jsonl", messages="messages")
    return list(make_examples(rows, config, with_template(tokenizer, template)))


def text_of(tokenizer: PreTrainedTokenizerFast, row: dict, template: str) -> str:
    return tokenizer.decode(examples(tokenizer, [row], template)[0].tokens)


def learnt(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return tokenizer.decode(example.tokens[example.weights > 0])


def expected(tokenizer: PreTrainedTokenizerFast, template: str, messages: list, tools: list | None = None) -> str:
    return with_template(tokenizer, template).apply_chat_template(messages, tools=tools, tokenize=False)


@pytest.fixture
def parquet(tmp_path):
    """Rows through a Parquet file, which fills records up with nulls."""

    def through(rows: list[dict]):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        return open_source(SourceConfig(path=str(tmp_path / "rows.parquet")))

    return through


def test_null_is_an_absent_key(chat_tokenizer, parquet):
    talks = [
        [{"role": "user", "name": "ann", "content": "hello"}, {"role": "assistant", "content": "hello there"}],
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine", "tool_calls": None}],
    ]
    rows = parquet([{"messages": talk} for talk in talks])
    assert rows[1]["messages"][0]["name"] is None
    for template in (NAMED, ITEMS):
        found = [chat_tokenizer.decode(example.tokens) for example in examples(chat_tokenizer, rows, template)]
        assert found == [expected(chat_tokenizer, template, talk) for talk in talks]
        assert "None" not in "".join(found)


def test_null_within_records_of_arrow(chat_tokenizer, parquet):
    # Both calls have both arguments in the file, one of them null; both tools have both parameters.
    calls = [{"what": "shoe"}, {"size": "12"}]
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}}}
        for name in ("what", "size")
    ]
    rows = [{"messages": calling(call), "tools": [tool]} for call, tool in zip(calls, tools, strict=True)]
    found = [chat_tokenizer.decode(each.tokens) for each in examples(chat_tokenizer, parquet(rows), ITEMS)]
    assert found == [expected(chat_tokenizer, ITEMS, row["messages"], row["tools"]) for row in rows]
    # In a row that is no record of Arrow, null is a value.
    assert "unit=null" in text_of(chat_tokenizer, {"messages": calling(ARGUMENTS)}, ITEMS)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_template(chat_tokenizer, as_text: bool):
    talk = calling(ARGUMENTS)
    row = {"messages": talk, "tools": json.dumps([TOOL]) if as_text else [TOOL]}
    (example,) = examples(chat_tokenizer, [row], ITEMS)
    tokenizer = with_template(chat_tokenizer, ITEMS)
    assert example.tokens.tolist() == tokenizer.apply_chat_template(talk, tools=[TOOL], return_dict=False)
    assert example.prompt.tolist() == tokenizer.apply_chat_template(
        talk[:-1], tools=[TOOL], add_generation_prompt=True, return_dict=False
    )


def test_a_template_of_its_own_for_tools(chat_tokenizer):
    tokenizer = copy.copy(chat_tokenizer)
    tokenizer.chat_template = {"default": TEXT_ONLY, "tool_use": ITEMS}
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    config = DataConfig(train="rows.jsonl", messages="messages")
    plain, tooled = make_examples([{"messages": talk}, {"messages": talk, "tools": [TOOL]}], config, tokenizer)
    assert plain.tokens.tolist() == tokenizer.apply_chat_template(talk, return_dict=False)
    assert tooled.tokens.tolist() == tokenizer.apply_chat_template(talk, tools=[TOOL], return_dict=False)


def test_an_answer_of_calls_alone_is_learnt(chat_tokenizer):
    (example,) = examples(chat_tokenizer, [{"messages": calling(ARGUMENTS)[:2]}], ITEMS)
    written = 'f(what="the shoe"unit=nullcount=2)'
    assert learnt(chat_tokenizer, example) == f"{written}<|im_end|>"
    assert example.completion == written
    for nothing in ({}, {"content": ""}, {"content": []}, {"tool_calls": []}, {"content": None, "tool_calls": None}):
        row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", **nothing}]}
        with pytest.raises(UserError, match=r"row 1: message 2 of 'messages' (is an empty completion|has no text)"):
            examples(chat_tokenizer, [row], ITEMS)


@pytest.mark.parametrize("template", [ITEMS, AS_JSON, AS_TEXT], ids=["items", "json", "text"])
def test_arguments_as_json_text(chat_tokenizer, template: str):
    written = text_of(chat_tokenizer, {"messages": calling(json.dumps(ARGUMENTS))}, template)
    # A template that prints the arguments as they are is made for text, the others for objects.
    wanted = json.dumps(ARGUMENTS) if template == AS_TEXT else ARGUMENTS
    assert written == expected(chat_tokenizer, template, calling(wanted))
    assert '\\"' not in written


def test_arguments_that_are_no_json(chat_tokenizer):
    rows = [{"messages": calling(ARGUMENTS)}, {"messages": calling("colour of the shoe")}]
    with pytest.raises(UserError, match="row 2: the tokenizer's chat template refuses the messages: TypeError"):
        examples(chat_tokenizer, rows, ITEMS)
    assert "f(colour of the shoe)" in text_of(chat_tokenizer, rows[1], AS_TEXT)


@pytest.mark.parametrize("template", [ITEMS, TEXT_ONLY, PRINTED], ids=["parts", "text", "printed"])
def test_content_as_text_parts(chat_tokenizer, template: str):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "the shoe?", "image": None}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    plain = [{"role": "user", "content": "what is the shoe?"}, {"role": "assistant", "content": "blue"}]
    (example,) = examples(chat_tokenizer, [{"messages": talk}], template)
    assert chat_tokenizer.decode(example.tokens) == expected(chat_tokenizer, template, plain)
    assert (example.completion, learnt(chat_tokenizer, example)[:4]) == ("blue", "blue")


NEVER = "{% for m in messages %}{% if m.role == 'model' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
NEVER += "{{ m.content }}{% endif %}{% endfor %}"
TWICE = "{% for m in messages %}{% generation %}{{ m.content }}{% generation %}b{% endgeneration %}{% endgeneration %}"
TWICE += "{% endfor %}"
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": TALK}, NEVER, "the conversation never enters the chat template's .* block"),
        ({"messages": TALK}, TWICE, "the chat template's .* blocks overlap"),
        ({"messages": TALK}, "{{ 1 // 0 }}", ".* refuses the messages: ZeroDivisionError"),
        ({"messages": TALK}, "{{ messages[0].missing.key }}", ".* refuses the messages"),
        ({"messages": TALK, "tools": "a hammer"}, TEXT_ONLY, "field 'tools' is no list of tools"),
        ({"messages": TALK, "tools": [1]}, TEXT_ONLY, "field 'tools' is no list of tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TALK[1]]},
            TEXT_ONLY,
            "message 1 of 'messages': part 1 of its 'content' is of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": ["hi"]}, TALK[1]]}, TEXT_ONLY, ".* part 1 .* has no text"),
        (
            {"messages": [{"content": "hi"}, TALK[1]]},
            TEXT_ONLY,
            "message 1 of 'messages' has no text under 'role'",
        ),
        ({"messages": [1, TALK[1]]}, TEXT_ONLY, "message 1 of 'messages' is no mapping"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": "f"}]}, TEXT_ONLY, "message 2 .* no list of calls"),
    ],
)
def test_errors_name_the_row(chat_tokenizer, row: dict, template: str, message: str):
    with pytest.raises(UserError, match=f"row 1: {message}"):
        examples(chat_tokenizer, [row], template)


USER, OTHER = [TALK[0]], [{"role": "user", "content": "how are you?"}]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (json.dumps(USER, indent=2), [USER]),
        (json.dumps({"messages": USER, "tools": [TOOL]}), [USER]),
        (json.dumps([USER, {"messages": OTHER}]), [USER, OTHER]),
        (f"{json.dumps(USER)}\n\n{json.dumps({'messages': OTHER})}\n", [USER, OTHER]),
    ],
)
def test_files_of_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: list):
    path = tmp_path / "talks.json"
    path.write_text(text)
    read = [talk for talk, _ in read_conversations(str(path), "messages")]
    assert [talk.messages for talk in read] == found
    assert read[0].tools == ([TOOL] if "tools" in text else None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert [talk for talk, _ in read_conversations("-", "messages")] == read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"[{]", "talks.json, line 1: malformed JSON"),
        (b'[{"role": "user", "content": "hello"}]\n[{]\n', "talks.json, line 2: malformed JSON"),
        (b"\xff", "not UTF-8"),
        (b'[{"role": "user", "content": "\\ud800"}]', "half of a surrogate pair"),
        (b"5", "not int"),
        (b"[]", "no list of messages"),
        (b'{"messages": [],\n "messages": [{"role": "user", "content": "a"}]}', "the key 'messages' stands twice"),
        (
            b'[{"role": "user", "role": "tool", "content": "a"}]\n[]',
            "line 1: .*the key 'role' stands twice",
        ),
        (b'{"messagse": []}', "did you mean 'messagse'"),
        (json.dumps([USER, TALK]).encode(), "conversation 2 ends with the assistant's turn"),
        (b'[{"role": "user"}]', "message 1 of 'messages' has no text under 'content'"),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "talks.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--messages: .*{message}"):
        read_conversations(str(path), "messages")
    with pytest.raises(UserError, match="cannot be read"):
        read_conversations(str(tmp_path), "messages")
