"""Conversations as their rows and files give them: checked, and without what storage has added to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from jaxtune.data.values import read_json
from jaxtune.errors import UserError, nearest
from jaxtune.files import user_path

TOOLS = "tools"
"""The field of a row with the tools of its conversation, as ``datasets`` for chats call it."""


class Conversation(NamedTuple):
    """What a chat template is given.

    Attributes:
      messages: mappings with ``role``, ``content`` (text or a list of text parts; may be absent from an assistant turn
        with ``tool_calls``) and whatever else the template reads.
      tools: JSON schemas of the functions that the assistant may call, if there are any.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def one_turn(prompt: str, completion: str | None = None) -> Conversation:
    """A prompt as the user's turn, and the assistant's answer to it where there is one."""
    answer = [] if completion is None else [{"role": "assistant", "content": completion}]
    return Conversation([{"role": "user", "content": prompt}, *answer], None)


def conversation(
    row: Mapping[str, Any], field: str, where: Callable[[], str], *, key: str, filled: bool = False
) -> Conversation:
    """The conversation of a row.

    Args:
      row: holds the messages under ``field`` and may hold ``tools``: a list of JSON schemas, or that list as JSON text.
      field: the field with the messages.
      where: says where the row stands; called for messages only.
      key: configuration key of the source, for messages.
      filled: the row comes from Arrow, where every record has the keys of all others, null where it had none. Then null
        is an absent key at any depth; elsewhere at the top of a message only, as in ``apply_chat_template``.

    Raises:
      UserError: there are no messages, or one of them or a tool is malformed.
    """
    if field not in row:
        raise UserError(f"{key}: {where()} has no field {field!r} (data.messages){nearest(field, row)}")
    messages = _records(row[field])
    if messages is None or not messages:
        raise UserError(f"{key}: {where()}: field {field!r} (data.messages) is no list of messages")
    checked = []
    for number, message in enumerate(messages, 1):
        place = f"message {number} of {field!r}"
        try:
            checked.append(_message(_present(message) if filled else message, place))
        except UserError as error:
            raise UserError(f"{key}: {where()}: {error}") from error
    return Conversation(checked, _tools(row, where, key, filled))


def read_conversations(path: str, field: str) -> list[tuple[Conversation, str]]:
    """Reads the conversations that are to be answered from a JSON or JSONL file.

    Args:
      path: the file, ``-`` for standard input: a list of messages, an object with that list under ``field`` and maybe
        ``tools``, or several of either kind: one on each line, or in a list.
      field: the field with the messages.

    Returns:
      Each conversation and where it stands, for messages.

    Raises:
      UserError: the file cannot be read, or holds something else, or a conversation leaves nothing to answer.
    """
    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(user_path(path)).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--messages: {name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--messages: {name}: not UTF-8 ({error.reason} at byte {error.start})") from error
    found = [(_to_be_answered(document, field, place), place) for document, place in _documents(text, name)]
    if not found:
        raise UserError(f"--messages: {name} is empty: no conversation")
    return found


def _documents(text: str, name: str) -> list[tuple[Any, str]]:
    lines = [(line, f"{name}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return [(_json_value(line, place), place) for line, place in lines]
    whole = _json_value(text, name)
    if isinstance(whole, list) and whole and not any(isinstance(each, dict) and "role" in each for each in whole):
        return [(each, f"{name}, conversation {number}") for number, each in enumerate(whole, 1)]
    return [(whole, name)]


def _json_value(text: str, place: str) -> Any:
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--messages: {place}: malformed JSON: {error}") from error


def _to_be_answered(document: Any, field: str, place: str) -> Conversation:
    try:
        # JSON can name half of a surrogate pair, which is no character: a tokenizer cannot take it.
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"--messages: {place}: {half} is half of a surrogate pair, which is no character") from error
    if isinstance(document, list):
        document = {field: document}
    if not isinstance(document, dict):
        raise UserError(
            f"--messages: {place}: a conversation is a list of messages or an object with it under {field!r}, not "
            f"{type(document).__name__}"
        )
    found = conversation(document, field, lambda: place, key="--messages")
    if found.messages[-1]["role"] == "assistant":
        raise UserError(f"--messages: {place} ends with the assistant's turn; leave out what is to be generated")
    return found


def _records(value: Any) -> list[Any] | None:
    """A list of records; TFDS gives it as a record of lists. ``None`` for anything else."""
    if isinstance(value, Mapping):
        lengths = {len(each) if _is_list(each) else None for each in value.values()}
        if len(lengths) != 1 or None in lengths:
            return None
        return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    return list(value) if _is_list(value) else None


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _present(value: Any) -> Any:
    """The value without the keys that are null, at any depth."""
    if isinstance(value, Mapping):
        return {name: _present(entry) for name, entry in value.items() if entry is not None}
    return [_present(entry) for entry in value] if _is_list(value) else value


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{place} is no mapping with 'role' and 'content'")
    found = {name: value for name, value in message.items() if value is not None}
    if not isinstance(found.get("role"), str):
        raise UserError(f"{place} has no text under 'role'")
    calls = _records(found.pop("tool_calls", []))
    if calls is None or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{place}: 'tool_calls' is no list of calls")
    if calls:
        # No call is no key: templates ask for the key, and storage fills it up with empty lists.
        found["tool_calls"] = [dict(call) for call in calls]
    assistant = found["role"] == "assistant"
    if "content" in found or not (assistant and calls):
        # What a tool gives back may be any JSON.
        tool = found["role"] == "tool" and found.get("content") is not None
        found["content"] = found["content"] if tool else _content(found.get("content"), place)
    if assistant and not calls and not content_text(found).strip():
        raise UserError(f"{place} is an empty completion")
    return found


def _content(content: Any, place: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise UserError(f"{place} has no text under 'content'")
    parts = []
    for number, part in enumerate(content, 1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or (kind == "text" and not isinstance(part.get("text"), str)):
            raise UserError(f"{place}: part {number} of its 'content' has no text under 'text'")
        if kind != "text":
            raise UserError(f"{place}: part {number} of its 'content' is of type {kind!r}; only text can be learnt")
        parts.append({name: value for name, value in part.items() if value is not None})
    return parts


def has_parts(message: Mapping[str, Any]) -> bool:
    """Whether a message's content is a list of text parts."""
    content = message.get("content")
    return _is_list(content) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    )


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message's content: its text parts with nothing between them, ``""`` where it has none."""
    content = message.get("content", "")
    return "".join(part["text"] for part in content) if has_parts(message) else content


def _tools(row: Mapping[str, Any], where: Callable[[], str], key: str, filled: bool) -> list[dict[str, Any]] | None:
    # An empty text is what storage without nulls has for none.
    given = _parsed(row.get(TOOLS) or None)
    tools = None if given is None else _records(given)
    found = None if tools is None else [_parsed(tool) for tool in tools]
    if (given is not None and found is None) or not all(isinstance(tool, Mapping) for tool in found or ()):
        raise UserError(f"{key}: {where()}: field {TOOLS!r} is no list of tools, each a JSON schema of a function")
    return [dict(_present(tool) if filled else tool) for tool in found] if found else None


def _parsed(value: Any) -> Any:
    """JSON text as the value that it holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
