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

from jaxtune.config.data_section import DataConfig
from jaxtune.data.chat import chat_text
from jaxtune.data.encoding import encode_prompts, encode_spans, special_id
from jaxtune.data.explode import explode
from jaxtune.data.messages import conversation, one_turn
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
      index: the example's place among all examples of its source (rows after exploding and splitting, before any is
        left out).
      prompt_length: how many tokens come before the completion, the last one if there are several (chat). 0 for text
        without a prompt.
      fields: the row, with the exploded entry.
      completion: the text to be learnt (the last assistant message of a chat).
      crossed: a token of the whole text would have crossed from what is given into what is learnt, so the given part's
        ids are those that it has on its own.
      given: what generation starts from where that is not ``tokens[:prompt_length]``.
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    index: int
    prompt_length: int
    fields: Mapping[str, Any]
    completion: str
    crossed: bool = False
    given: Int32[np.ndarray, " given"] | None = None

    @property
    def prompt(self) -> Int32[np.ndarray, " given"]:
        """What generation of the completion starts from: in a chat the messages before it and the generation prompt."""
        return self.tokens[: self.prompt_length] if self.given is None else self.given


class Examples(Sequence[Example]):
    """The examples of a source.

    Attributes:
      name: the source, as messages name it.
      total: how many examples the source has.
      dropped: how many of them were left out because they are too long.
      truncated: how many of them were cut to fit.
      split: how many of them became several.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        name: str,
        total: int,
        dropped: int = 0,
        truncated: int = 0,
        split: int = 0,
    ):
        self._examples = list(examples)
        self.name = name
        self.total = total
        self.dropped = dropped
        self.truncated = truncated
        self.split = split

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def crossed(self) -> int:
        """In how many of them a token would have crossed from what is given into what is learnt."""
        return sum(example.crossed for example in self._examples)


class Fronted(Sequence[Example]):
    """Examples with positions in front that hold no token of theirs, for methods that put something of their own there.

    Args:
      examples: the same.
      count: so many positions; they weigh 0, and hold token 0.
    """

    def __init__(self, examples: Sequence[Example], count: int):
        self._examples, self._count = examples, count

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        example = self._examples[index]
        return dataclasses.replace(
            example,
            tokens=np.concatenate([np.zeros(self._count, np.int32), example.tokens]),
            weights=np.concatenate([np.zeros(self._count, np.float32), example.weights]),
            prompt_length=example.prompt_length + self._count,
        )


def fronted(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """Examples with so many positions in front; the same ones for none."""
    return Fronted(examples, count) if count else examples


@dataclasses.dataclass(frozen=True)
class _Text:
    """An example as text: its row, where in the text stands what is learnt, what generation starts from."""

    row: int
    fields: Mapping[str, Any]
    text: str
    spans: list[tuple[int, int]]
    prompt: str
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
    has it, and are given their row's ``tools``. With ``config.chat`` a prompt and its completion are a chat of one
    turn. See :mod:`jaxtune.data.encoding` for what happens at the boundary between what is given and what is learnt.

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
    texts = (
        _chats(rows, config, tokenizer, key) if config.messages is not None else _prompts(rows, config, tokenizer, key)
    )
    examples = _encode(texts, rows, config, tokenizer, key)
    return _fit(examples, texts, rows, config, tokenizer, sequence_length, key)


def _exploded(rows: Sequence[Any], config: DataConfig, key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return iter(enumerate(rows) if config.explode is None else explode(rows, config.explode, key=key))


def _prompts(rows: Sequence[Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> list[_Text]:
    prompt = None if config.prompt is None else Template(config.prompt, key="data.prompt")
    completion = Template(config.completion or "", key="data.completion")
    texts = []
    for index, fields in _exploded(rows, config, key):
        where = functools.partial(locate, rows, index)
        answer = completion.render(fields, where)
        if not answer.strip():
            raise UserError(f"{key}: {where()}: empty completion: {config.completion!r} gives {answer!r}")
        question = "" if prompt is None else prompt.render(fields, where)
        if config.chat:
            chat = chat_text(one_turn(question, answer), tokenizer, where, key=key)
            texts.append(_Text(index, fields, chat.text, chat.spans, chat.prompt, chat.completion))
            continue
        text = question + answer
        texts.append(_Text(index, fields, text, [(len(question), len(text))], question, answer))
    if config.chat and any(text.text[text.spans[-1][0] :][:1].isspace() for text in texts):
        logger.warning(
            "data.completion: begins with white space, which the chat template keeps, so every answer is taught to "
            "begin with it; leave it out"
        )
    return texts


def _chats(rows: Sequence[Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> list[_Text]:
    texts = []
    filled = isinstance(rows, Source) and rows.filled
    for index, fields in _exploded(rows, config, key):
        where = functools.partial(locate, rows, index)
        talk = conversation(fields, config.messages or "", where, key=key, filled=filled)
        chat = chat_text(talk, tokenizer, where, key=key)
        texts.append(_Text(index, fields, chat.text, chat.spans, chat.prompt, chat.completion))
    return texts


def _encode(
    texts: list[_Text], rows: Sequence[Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> list[Example]:
    chat = config.templated
    encoded = encode_spans(tokenizer, [text.text for text in texts], [text.spans for text in texts], rendered=chat)
    # Which span begins where the prompt ends; in a chat a template may have none that does.
    asked = [_span_after(text) for text in texts]
    # Cut at its only span, a text already holds the prompt's own ids; cut at one of several, others may come before.
    apart = [
        place
        for place, (_, spans, crossed) in enumerate(encoded)
        if asked[place] is None or (crossed and len(spans) > 1)
    ]
    prompts = encode_prompts(tokenizer, [texts[place].prompt for place in apart], rendered=chat)
    given = {place: np.asarray(ids, np.int32) for place, ids in zip(apart, prompts, strict=True)}
    end = None if chat else special_id(tokenizer, "eos_token")
    examples = []
    for index, (text, (ids, spans, crossed)) in enumerate(zip(texts, encoded, strict=True)):
        if end is not None and ids[-1:] != [end]:
            ids, spans = [*ids, end], [*spans[:-1], (spans[-1][0], len(ids) + 1)]
        tokens, weights = np.asarray(ids, np.int32), np.zeros(len(ids), np.float32)
        for first, stop in [(0, len(ids))] if config.loss_on == "all" else spans:
            weights[first:stop] = 1
        weights[:1] = 0
        if not weights.any():
            raise UserError(
                f"{key}: {locate(rows, text.row)}: the completion {text.completion!r} leaves no token to predict"
            )
        place = asked[index]
        length = spans[-1 if place is None else place][0]
        examples.append(
            Example(tokens, weights, index, length, text.fields, text.completion, crossed, given.get(index))
        )
    if chat:
        _tell(examples, asked, key)
    return examples


def _span_after(text: _Text) -> int | None:
    if not text.text.startswith(text.prompt):
        return None
    return next((place for place, (start, _) in enumerate(text.spans) if start == len(text.prompt)), None)


def _tell(examples: list[Example], asked: list[int | None], key: str) -> None:
    """Says where training and generation cannot agree on a text's ids."""
    crossed, elsewhere = sum(example.crossed for example in examples), asked.count(None)
    if crossed:
        logger.warning(
            "%s: in %d of %d conversations a token of the whole text would cross from what is given into what is "
            "learnt; there the given part keeps the ids that generation starts from",
            key,
            crossed,
            len(examples),
        )
    if elsewhere:
        logger.warning(
            "%s: in %d of %d conversations the last answer that is learnt does not begin where the chat template's "
            "generation prompt ends, so generation starts from other text than training shows",
            key,
            elsewhere,
            len(examples),
        )


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
        return Examples(examples, name=name, total=total)
    longest = max(long, key=lambda example: len(example.tokens))
    what = (
        f"{len(long)} of {total} examples are longer than train.sequence_length {sequence_length}; the longest, from "
        f"{locate(rows, texts[longest.index].row)}, takes {len(longest.tokens) - 1}"
    )
    if config.too_long == "error":
        raise UserError(f"{key}: {what}. Raise train.sequence_length, or set data.too_long to drop, truncate or split")
    if config.too_long == "split":
        pieces = [piece for example in examples for piece in split(example, limit)]
        pieces = [dataclasses.replace(piece, index=index) for index, piece in enumerate(pieces)]
        learnt = [piece for piece in pieces if piece.weights.any()]
        logger.warning(
            "%s: %s: split into %d rows, %d without a token to learn are left out",
            *(key, what, len(pieces) - total + len(long), len(pieces) - len(learnt)),
        )
        return Examples(learnt, name=name, total=total, split=len(long))
    cut = 0
    kept = []
    for example in examples:
        if len(example.tokens) > limit and config.too_long == "truncate":
            example = truncate(example, limit, begins_with=special_id(tokenizer, "bos_token"), chat=config.templated)
            cut += bool(example.weights.any())
        if len(example.tokens) <= limit and example.weights.any():
            kept.append(example)
    if not kept:
        ways = "truncate or split" if config.too_long == "drop" else "split"
        raise UserError(
            f"{key}: every example is too long: {what}. Raise train.sequence_length, or set data.too_long to {ways}"
        )
    dropped = total - len(kept)
    logger.warning("%s: %s: %d cut, %d left out", key, what, cut, dropped)
    return Examples(kept, name=name, total=total, dropped=dropped, truncated=cut)


def split(example: Example, limit: int) -> list[Example]:
    """Cuts an example into consecutive ones of at most ``limit`` tokens.

    Each begins with the last token of the one before, which is there to be predicted from and weighs 0. So the pieces'
    weighted tokens are the example's, each once.
    """
    pieces = []
    for start in range(0, max(1, len(example.tokens) - 1), limit - 1):
        tokens, weights = example.tokens[start : start + limit], example.weights[start : start + limit].copy()
        weights[:1] = 0
        prompt_length = min(max(example.prompt_length - start, 0), len(tokens))
        pieces.append(dataclasses.replace(example, tokens=tokens, weights=weights, prompt_length=prompt_length))
    return pieces


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
    # A chat is asked its last question in full, wherever training is cut; a prompt that lost its beginning, as trained.
    given = example.prompt if chat else None
    return dataclasses.replace(example, tokens=tokens, weights=weights, prompt_length=min(prompt, limit), given=given)
