"""Chat messages as text in which the assistant's turns are known exactly."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtune.errors import UserError, nearest

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Segment(NamedTuple):
    """A piece of an example's text and whether it is what the model is to write."""

    text: str
    learnt: bool


def chat_segments(
    row: Mapping[str, Any], field: str, tokenizer: PreTrainedTokenizerBase, where: Callable[[], str], *, key: str
) -> tuple[list[Segment], str]:
    """Renders a conversation with the tokenizer's own template and cuts it at the ends of the assistant's turns.

    An assistant turn begins where the generation prompt ends, which is where generation will begin, and ends with the
    end-of-text token, or with the turn where the template writes none. Templates with ``{% generation %}`` blocks say
    themselves where it is. For others, the conversation up to a turn is rendered on its own and must be the beginning
    of the whole: a template that renders a conversation's start differently once it goes on is an error.

    Args:
      row: holds the messages.
      field: the field with the messages: a list of mappings with ``role`` and ``content``.
      tokenizer: has the template.
      where: says where the row stands; called for messages only.
      key: configuration key of the source, for messages.

    Returns:
      The segments in order, and the content of the last assistant turn.

    Raises:
      UserError: the messages are malformed, hold no answer, or the template cannot render them or is not stable.
    """
    messages = _messages(row, field, where, key)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            "data.messages: the tokenizer has no chat template; give prompt and completion instead"
        ) from error
    try:
        if _GENERATION_TAG.search(template):
            text, spans = _tagged_spans(messages, tokenizer, template)
        else:
            text, spans = _prefix_spans(messages, tokenizer, where, key)
    except jinja2.TemplateError as error:
        raise UserError(f"{key}: {where()}: the tokenizer's chat template refuses the messages: {error}") from error
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    segments, done = [], 0
    for start, stop in spans:
        stop = _through_end_of_text(text, start, stop, tokenizer)
        segments += [Segment(text[done:start], False), Segment(text[start:stop], True)]
        done = stop
    segments.append(Segment(text[done:], False))
    return [segment for segment in segments if segment.text], answers[-1]


def _messages(row: Mapping[str, Any], field: str, where: Callable[[], str], key: str) -> list[dict[str, Any]]:
    if field not in row:
        raise UserError(f"{key}: {where()} has no field {field!r} (data.messages){nearest(field, row)}")
    messages = row[field]
    lengths = {_length(values) for values in messages.values()} if isinstance(messages, Mapping) else {None}
    if len(lengths) == 1 and None not in lengths:
        # TFDS gives a sequence of records as a record of sequences.
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{key}: {where()}: field {field!r} (data.messages) is no list of messages")
    for number, message in enumerate(messages, 1):
        for name in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(name), str):
                raise UserError(f"{key}: {where()}: message {number} of {field!r} has no text under {name!r}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise UserError(f"{key}: {where()}: message {number} of {field!r} is an empty completion")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{key}: {where()}: {field!r} has no assistant message, so there is nothing to learn")
    return [dict(message) for message in messages]


def _length(value: Any) -> int | None:
    """The length of a list, None for anything else."""
    return len(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def _tagged_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[tuple[int, int]]]:
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **special
    )
    texts, spans = rendered
    return texts[0], [(start, stop) for start, stop in spans[0]]


def _prefix_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: Callable[[], str], key: str
) -> tuple[str, list[tuple[int, int]]]:
    whole = _render(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise UserError(
                f"{key}: {where()}: the conversation begins with the assistant, and the chat template has no "
                "{% generation %} block that shows where its turn begins"
            )
        before = _render(tokenizer, messages[:index], generation_prompt=True)
        after = _render(tokenizer, messages[: index + 1])
        if not (whole.startswith(after) and after.startswith(before)) or len(after) == len(before):
            raise UserError(
                f"{key}: {where()}: the chat template renders message {index + 1} differently on its own and inside "
                "the conversation, so the place of the answer is unknown; use a template with {% generation %} blocks, "
                "or one answer per conversation"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, generation_prompt: bool = False
) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))


def _through_end_of_text(text: str, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where generation of a turn ends: after the end-of-text token if the turn holds it, else at the turn's end."""
    end = str(tokenizer.eos_token or "")
    found = text.rfind(end, start, stop) if end else -1
    return stop if found < 0 else found + len(end)
