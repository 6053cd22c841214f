"""Rows as examples: token ids with a loss weight for each."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from transformers import PreTrainedTokenizerBase

from jaxtune.config.schema import DataConfig
from jaxtune.data.chat import Segment, chat_segments
from jaxtune.data.encoding import encode_continuations, encode_prompts, special_id
from jaxtune.data.explode import explode
from jaxtune.data.prompts import Template
from jaxtune.data.sources import Source, locate
from jaxtune.data.template_date import dated
from jaxtune.errors import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One example, ready for the model.

    Attributes:
      tokens: token ids, prompt and completion.
      weights: loss weight of predicting each token from those before it; the first token has none to be predicted from
        and weighs 0.
      index: the example's place among all examples of its source (rows after exploding, before any is left out).
      prompt_length: how many tokens come before the completion, the last one if there are several (chat);
        ``tokens[:prompt_length]`` is what generation starts from. 0 for text without a prompt.
      fields: the row, with the exploded entry.
      completion: the text to be learnt (the last assistant message of a chat).
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    index: int
    prompt_length: int
    fields: Mapping[str, Any]
    completion: str


class Examples(Sequence[Example]):
    """The examples of a source.

    Attributes:
      name: the source, as messages name it.
      total: how many examples the source has.
      dropped: how many of them were left out because they are too long.
      truncated: how many of them were cut to fit.
    """

    def __init__(self, examples: Sequence[Example], *, name: str, total: int, dropped: int, truncated: int):
        self._examples = list(examples)
        self.name = name
        self.total = total
        self.dropped = dropped
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)


@dataclasses.dataclass(frozen=True)
class _Text:
    """An example as text: its row, the pieces of its text and the completion."""

    row: int
    fields: Mapping[str, Any]
    segments: list[Segment]
    completion: str


def make_examples(
    rows: Sequence[Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int | None = None,
    key: str = "data.train",
) -> Examples:
    """Renders and tokenises all rows.

    Everything is tokenised here, once: whatever is wrong with a row is known before training starts, packing and the
    number of steps in an epoch need the lengths, and a batch call of a fast tokenizer takes about a second for 10,000
    examples. The ids cost 8 bytes per token in memory.

    A tokenizer's end-of-text token, if it has one, ends every example made from templates; chats end as their template
    has it. See :mod:`jaxtune.data.encoding` for what happens at the boundary between prompt and completion.

    Args:
      rows: a :class:`~jaxtune.data.sources.Source`, or any sequence of mappings.
      config: templates or messages, explode, what the loss is on, what happens to long examples.
      tokenizer: a tokenizer of ``transformers``; it needs no padding token.
      sequence_length: positions in a row of a batch. An example of n tokens takes n - 1 of them. ``None``: any length.
      key: configuration key of the source, for messages.

    Raises:
      UserError: a row lacks a field, its completion is empty, an example is too long and may not be, or all are.
    """
    if not len(rows):
        raise UserError(f"{key}: no rows")
    tokenizer = dated(tokenizer, config.date)
    texts = _chats(rows, config, tokenizer, key) if config.messages is not None else _prompts(rows, config, key)
    examples = _encode(texts, rows, config, tokenizer, key)
    return _fit(examples, texts, rows, config, tokenizer, sequence_length, key)


def _exploded(rows: Sequence[Any], config: DataConfig, key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return iter(enumerate(rows) if config.explode is None else explode(rows, config.explode, key=key))


def _prompts(rows: Sequence[Any], config: DataConfig, key: str) -> list[_Text]:
    prompt = None if config.prompt is None else Template(config.prompt, key="data.prompt")
    completion = Template(config.completion or "", key="data.completion")
    texts = []
    for index, fields in _exploded(rows, config, key):
        where = functools.partial(locate, rows, index)
        answer = completion.render(fields, where)
        if not answer.strip():
            raise UserError(f"{key}: {where()}: empty completion: {config.completion!r} gives {answer!r}")
        question = "" if prompt is None else prompt.render(fields, where)
        segments = [Segment(question, False)] if question else []
        texts.append(_Text(index, fields, [*segments, Segment(answer, True)], answer))
    return texts


def _chats(rows: Sequence[Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> list[_Text]:
    texts = []
    for index, fields in _exploded(rows, config, key):
        where = functools.partial(locate, rows, index)
        segments, answer = chat_segments(fields, config.messages or "", tokenizer, where, key=key)
        texts.append(_Text(index, fields, segments, answer))
    return texts


def _encode(
    texts: list[_Text], rows: Sequence[Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> list[Example]:
    chat = config.messages is not None
    heads = encode_prompts(tokenizer, [text.segments[0].text for text in texts], rendered=chat)
    tails = encode_continuations(tokenizer, (segment.text for text in texts for segment in text.segments[1:]))
    end = None if chat else special_id(tokenizer, "eos_token")
    examples = []
    for index, (text, head) in enumerate(zip(texts, heads, strict=True)):
        pieces = [head, *(tails[segment.text] for segment in text.segments[1:])]
        if end is not None and pieces[-1][-1:] != [end]:
            pieces[-1] = [*pieces[-1], end]
        learnt = [segment.learnt for segment in text.segments]
        last = max(number for number, is_learnt in enumerate(learnt) if is_learnt)
        tokens = np.asarray([token for piece in pieces for token in piece], np.int32)
        weights = np.repeat(np.asarray(learnt, np.float32), [len(piece) for piece in pieces])
        if config.loss_on == "all":
            weights[:] = 1
        weights[:1] = 0
        if not weights.any():
            raise UserError(
                f"{key}: {locate(rows, text.row)}: the completion {text.completion!r} leaves no token to predict"
            )
        prompt_length = sum(len(piece) for piece in pieces[:last])
        examples.append(Example(tokens, weights, index, prompt_length, text.fields, text.completion))
    return examples


def _fit(
    examples: list[Example],
    texts: list[_Text],
    rows: Sequence[Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int | None,
    key: str,
) -> Examples:
    """Applies ``config.too_long`` to examples that take more than ``sequence_length`` positions."""
    name = rows.name if isinstance(rows, Source) else key
    total = len(examples)
    limit = total if sequence_length is None else sequence_length + 1
    long = [] if sequence_length is None else [example for example in examples if len(example.tokens) > limit]
    if not long:
        return Examples(examples, name=name, total=total, dropped=0, truncated=0)
    longest = max(long, key=lambda example: len(example.tokens))
    what = (
        f"{len(long)} of {total} examples are longer than train.sequence_length {sequence_length}; the longest, from "
        f"{locate(rows, texts[longest.index].row)}, takes {len(longest.tokens) - 1}"
    )
    if config.too_long == "error":
        raise UserError(f"{key}: {what}. Raise train.sequence_length, or set data.too_long to drop or truncate")
    if len(long) == total:
        raise UserError(f"{key}: every example is too long: {what}. Raise train.sequence_length")
    cut = 0
    kept = []
    for example in examples:
        if len(example.tokens) > limit and config.too_long == "truncate":
            example = truncate(
                example, limit, begins_with=special_id(tokenizer, "bos_token"), chat=config.messages is not None
            )
            cut += bool(example.weights.any())
        if len(example.tokens) <= limit and example.weights.any():
            kept.append(example)
    dropped = total - len(kept)
    logger.warning("%s: %s: %d cut, %d left out", key, what, cut, dropped)
    return Examples(kept, name=name, total=total, dropped=dropped, truncated=cut)


def truncate(example: Example, limit: int, *, begins_with: int | None, chat: bool = False) -> Example:
    """Cuts an example to ``limit`` tokens.

    A prompt loses its beginning (but not the token ``begins_with``, if it begins with that), so that the question that
    stands at its end and the answer stay; a token of it is left, and what is still too much is cut from the
    completion's end. Text without a prompt, and a chat, lose their end; a chat that is cut before its first answer has
    no weighted token left.
    """
    tokens, weights, prompt = example.tokens, example.weights, example.prompt_length
    if not chat and prompt > 0:
        head = int(begins_with is not None and tokens[0] == begins_with and prompt > 1)
        remove = min(len(tokens) - limit, prompt - head - 1)
        keep = np.r_[0:head, head + remove : len(tokens)]
        tokens, weights, prompt = tokens[keep], weights[keep], prompt - remove
        if not head:
            weights[:1] = 0
    tokens, weights = tokens[:limit], weights[:limit]
    return dataclasses.replace(example, tokens=tokens, weights=weights, prompt_length=min(prompt, limit))
