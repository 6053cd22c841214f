"""Chat messages as text in which the assistant's turns are known exactly."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtune.data.messages import Conversation, content_text, has_parts
from jaxtune.errors import UserError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Spans = list[tuple[int, int]]


class ChatText(NamedTuple):
    """A conversation as text.

    Attributes:
      text: the whole conversation.
      spans: first character and end of each piece that is to be learnt, in order.
      prompt: what generation of the last answer starts from: the messages before it, and the generation prompt.
      completion: the last answer: its content, or all that the template makes of it where it calls tools.
    """

    text: str
    spans: Spans
    prompt: str
    completion: str


def chat_text(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: Callable[[], str], *, key: str
) -> ChatText:
    """Renders a conversation with the tokenizer's own template and finds the assistant's turns in it.

    An assistant turn begins where the generation prompt ends, which is where generation will begin, and ends with the
    end-of-text token, or with the turn where the template writes none. Templates with ``{% generation %}`` blocks say
    themselves where it is. For others, the conversation up to a turn is rendered on its own and must be the beginning
    of the whole: a template that renders a conversation's start differently once it goes on is an error.

    Args:
      conversation: the messages and tools.
      tokenizer: has the template.
      where: says where the conversation stands; called for messages only.
      key: configuration key of the source, for messages.

    Raises:
      UserError: there is no answer, or the template cannot render the messages or is not stable.
    """
    answers = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError(f"{key}: {where()}: the messages hold no assistant message, so there is nothing to learn")
    renderer = _Renderer(conversation, tokenizer, where, key)
    text, last, end = renderer.text, answers[-1], str(tokenizer.eos_token or "")
    spans = renderer.tagged_spans() if renderer.tagged else [renderer.turn(number) for number in answers]
    spans = [(start, _through_end_of_text(text, start, stop, end)) for start, stop in spans]
    prompt = renderer.render(last, generation_prompt=True) if renderer.tagged and last else text[: spans[-1][0]]
    if text.startswith(prompt):
        # Where a block takes in what the generation prompt writes, all of it is learnt, and generation begins within.
        spans = _split_at(spans, len(prompt))
    completion = content_text(conversation.messages[last])
    if "tool_calls" in conversation.messages[last]:
        completion = text[slice(*spans[-1])].removesuffix(end).strip()
    return ChatText(text, spans, prompt, completion)


def chat_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, place: str, *, key: str) -> str:
    """The text that generation of an answer starts from: the conversation and the generation prompt.

    Args:
      conversation: the messages and tools.
      tokenizer: has the template.
      place: where the conversation stands, for messages.
      key: what it was given as, for messages.

    Raises:
      UserError: the tokenizer has no template, or one that cannot render the messages.
    """
    renderer = _Renderer(conversation, tokenizer, lambda: place, key)
    return renderer.render(len(conversation.messages), generation_prompt=True)


class _Renderer:
    """A conversation in the form that its template takes.

    Attributes:
      tagged: the template has ``{% generation %}`` blocks.
      text: the whole conversation, rendered.
    """

    def __init__(
        self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: Callable[[], str], key: str
    ):
        try:
            self._template = tokenizer.get_chat_template(tools=conversation.tools)
        except ValueError as error:
            instead = "texts with --prompt" if key == "--messages" else "prompt and completion without data.chat"
            raise UserError(
                f"{key}: the tokenizer has no chat template ({' '.join(str(error).split())[:80]}…); use a model that "
                f"has one, or give {instead}"
            ) from error
        self._tools: Any = conversation.tools
        self._where, self._key = where, key
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.tagged = _GENERATION_TAG.search(self._template) is not None
        self._messages, self.text, self._tags = self._in_form(conversation.messages)

    def render(self, count: int, *, generation_prompt: bool = False) -> str:
        """The first ``count`` messages."""
        try:
            return self._rendered(self._messages[:count], generation_prompt)[0]
        except Exception as error:  # a template is a program: it raises what it likes
            raise self._refusal(error) from error

    def tagged_spans(self) -> Spans:
        """What the template's own blocks mark."""
        spans = [(start, stop) for start, stop in self._tags if start < stop]
        if not spans:
            raise self._error(
                "the conversation never enters the chat template's {% generation %} block, so there is nothing to learn"
            )
        if any(stop > start for (_, stop), (start, _) in itertools.pairwise(spans)) or spans[-1][1] > len(self.text):
            raise self._error("the chat template's {% generation %} blocks overlap: the place of an answer is unknown")
        return spans

    def turn(self, number: int) -> tuple[int, int]:
        """Where message ``number`` stands after its generation prompt."""
        if number == 0:
            raise self._error(
                "the conversation begins with the assistant, and the chat template has no {% generation %} block that "
                "shows where its turn begins"
            )
        before, after = self.render(number, generation_prompt=True), self.render(number + 1)
        if not (self.text.startswith(after) and after.startswith(before)) or len(after) == len(before):
            raise self._error(
                f"the chat template renders message {number + 1} differently on its own and inside the conversation, "
                "so the place of the answer is unknown; use a template with {% generation %} blocks, or one answer per "
                "conversation"
            )
        return len(before), len(after)

    def _in_form(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str, Spans]:
        """The messages in the first form that the template takes, and the whole text.

        Templates differ in whether content may be a list of parts, and arguments of a call JSON text: some raise, some
        print the list or quote the text once more. The form as given comes first.
        """
        taken, refused = [], []
        for form in _forms(messages):
            try:
                text, tags = self._rendered(form, False)
            except Exception as error:  # a template is a program: it raises what it likes
                refused.append(error)
                continue
            taken.append((form, text, tags))
            if not any(shown in text for shown in _raw(form)):
                return form, text, tags
        if not taken:
            raise self._refusal(refused[0]) from refused[0]
        return taken[0]

    def _rendered(self, messages: list[dict[str, Any]], generation_prompt: bool) -> tuple[str, Spans]:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=self._tools,
            chat_template=self._template,
            return_assistant_tokens_mask=self.tagged,
            add_generation_prompt=generation_prompt,
            **self._special,
        )
        texts, spans = rendered
        return texts[0], [(start, stop) for start, stop in spans[0]] if self.tagged else []

    def _refusal(self, error: Exception) -> UserError:
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return self._error(f"the tokenizer's chat template refuses the messages: {kind}{error}")

    def _error(self, message: str) -> UserError:
        return UserError(f"{self._key}: {self._where()}: {message}")


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages as given, with calls' arguments as objects, with content as text, and with both."""
    parsed = [_with_parsed_arguments(message) for message in messages]
    yield messages
    if parsed != messages:
        yield parsed
    if any(map(has_parts, messages)):
        for form in [messages] if parsed == messages else [messages, parsed]:
            yield [{**message, "content": content_text(message)} if has_parts(message) else message for message in form]


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        arguments = function.get("arguments")
        found = _json_object(arguments)
        if found is not None:
            function = {**function, "arguments": found}
            call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return {**message, "tool_calls": calls}


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a call names and gives arguments to: the call itself, or its ``function``."""
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _json_object(arguments: Any) -> dict[str, Any] | None:
    if not isinstance(arguments, str):
        return None
    try:
        value = json.loads(arguments)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _raw(messages: list[dict[str, Any]]) -> Iterator[str]:
    """How Python's lists and objects, and JSON text quoted once more, look in a text that should not show them."""
    for message in messages:
        if has_parts(message):
            yield str(message["content"])
        for call in message.get("tool_calls", ()):
            arguments = _function(call).get("arguments")
            if _json_object(arguments) is not None:
                yield json.dumps(arguments, ensure_ascii=False)
            elif isinstance(arguments, Mapping) and arguments:
                yield str(arguments)


def _split_at(spans: Spans, cut: int) -> Spans:
    """The spans, the one around ``cut`` as two."""
    pieces = [((start, cut), (cut, stop)) if start < cut < stop else ((start, stop),) for start, stop in spans]
    return list(itertools.chain.from_iterable(pieces))


def _through_end_of_text(text: str, start: int, stop: int, end: str) -> int:
    """Where generation of a turn ends: after the end-of-text token if the turn holds it, else at the turn's end."""
    found = text.rfind(end, start, stop) if end else -1
    return stop if found < 0 else found + len(end)
