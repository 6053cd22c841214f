"""Text to token ids, so that what a prompt becomes in training is what it becomes in generation.

An example is one text with places in it where what is given ends and what is to be learnt begins. Its ids are those of
the whole text, so that each piece is encoded after what really precedes it: some tokenizers (SentencePiece's dummy
prefix) write a space after a special token and none within running text.

Only where a token would grow over such a place (``"Answer: "`` + ``"blue"`` gives a token ``" blue"`` that generation,
which starts from the prompt's own ids, never sees) is the text cut: the given part keeps the ids that it has on its
own, and what follows is encoded as a continuation of running text.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Texts to put in front of a continuation, tried in this order: no tokenizer merges all of them with what follows.
_ANCHORS = (":", "\n", "a")

# Texts encoded at a time: a tokenizer's own record of a token (text, offsets, masks) takes many times the id's room.
_CHUNK = 1000


class Encoded(NamedTuple):
    """A text as token ids.

    Attributes:
      ids: the ids, special tokens in front included.
      spans: first token and end of each span that is to be learnt.
      crossed: a token of the whole text would have crossed the beginning of a span, so the text was cut there.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    crossed: bool


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, rendered: bool = False
) -> list[list[int]]:
    """Token ids of texts that begin an example: prompts, or whole texts.

    Special tokens in front are the tokenizer's own choice, and stand there once even where the text writes them too; an
    end-of-text token that it appends is left out, as the text goes on.

    Args:
      tokenizer: a tokenizer of ``transformers``.
      texts: the texts.
      rendered: the texts come from a chat template, which has written the special tokens already.
    """
    front = [] if rendered else _special_front(tokenizer)
    return [[*front, *_without(front, ids, tokenizer)] for ids in _encode(tokenizer, texts, special=False)]


def encode_spans(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    rendered: bool = False,
) -> list[Encoded]:
    """Token ids of texts of which some spans are to be learnt.

    The ids up to the beginning of a span are those that the text up to there has on its own, which is what generation
    starts from, as long as no token crosses the beginning of an earlier span. A token that crosses the end of a span
    belongs to it.

    Args:
      tokenizer: a tokenizer of ``transformers``.
      texts: the texts.
      spans: of each text, first character and end of what is to be learnt: at least one, in order, without overlap.
      rendered: as for :func:`encode_prompts`.
    """
    front = [] if rendered else _special_front(tokenizer)
    encoded = []
    for begin in range(0, len(texts), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        for ids, ranges, crossed in _encode_chunk(tokenizer, texts[chunk], spans[chunk]):
            kept = _without(front, ids, tokenizer)
            shift = len(front) + len(kept) - len(ids)
            # A text that is learnt from its beginning is learnt with what stands in front of it.
            moved = [(first + shift if first else 0, end + shift) for first, end in ranges]
            encoded.append(Encoded([*front, *kept], moved, crossed))
    return encoded


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of texts that follow running text, by text; each distinct text is encoded once."""
    waiting = list(dict.fromkeys(texts))
    encoded: dict[str, list[int]] = {}
    for anchor in _ANCHORS:
        prefix = _encode(tokenizer, [anchor], special=False)[0]
        if not waiting or tokenizer.unk_token_id in prefix:
            continue
        for text, ids in zip(
            waiting, _encode(tokenizer, [anchor + text for text in waiting], special=False), strict=True
        ):
            if ids[: len(prefix)] == prefix:
                encoded[text] = ids[len(prefix) :]
        waiting = [text for text in waiting if text not in encoded]
    encoded.update(zip(waiting, _encode(tokenizer, waiting, special=False), strict=True))
    return encoded


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of the tokenizer's special token ``name`` (``bos_token``, ``eos_token``); ``None`` if it has none."""
    token = getattr(tokenizer, name)
    if token is None:
        return None
    token_id = tokenizer.convert_tokens_to_ids(str(token))
    return token_id if isinstance(token_id, int) else None


def _encode_chunk(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
) -> list[Encoded]:
    """The ids of texts, without special tokens in front."""
    encoded = [Encoded([], [], False) for _ in texts]
    waiting = [(place, text, list(parts)) for place, (text, parts) in enumerate(zip(texts, spans, strict=True))]
    continued = False
    while waiting:
        pieces = _Pieces(tokenizer, waiting, continued=continued)
        later = []
        for number, (place, text, parts) in enumerate(waiting):
            done, ranges, _ = encoded[place]
            ids, kept = pieces.whole[number], pieces.crossing(number)
            if kept < len(parts):
                # The given part keeps its own ids; what follows is encoded anew, and may be cut again.
                start = parts[kept][0]
                ids = pieces.prefix(number, start)
                later.append((place, text[start:], [(first - start, stop - start) for first, stop in parts[kept:]]))
            ranges = ranges + [
                (
                    len(done) + len(pieces.prefix(number, start)),
                    len(done) + _reach(tokenizer, ids, pieces.prefix(number, stop)),
                )
                for start, stop in parts[:kept]
            ]
            encoded[place] = Encoded(done + ids, ranges, continued or kept < len(parts))
        waiting, continued = later, True
    return encoded


class _Pieces:
    """The ids of texts, and of each text up to the places where its spans begin and end.

    Text is split at added tokens before anything else, so what precedes one does not change what follows it. A prefix's
    ids are therefore the whole's up to its last added token, and from there those of a short text, which in chats is
    the same few for all rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[tuple[int, str, list[tuple[int, int]]]],
        *,
        continued: bool,
    ):
        """Encodes all texts together.

        Args:
          tokenizer: a tokenizer of ``transformers``.
          items: number, text and spans of each.
          continued: they follow running text.
        """
        self._items = items
        texts = [text for _, text, _ in items]
        if continued:
            splits: list[list[tuple[int, int, int]]] = [[] for _ in items]
        else:
            encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            splits = _splits(tokenizer, texts, encoding)
            self.whole: list[list[int]] = encoding["input_ids"]
        # For each place: how many of the whole's tokens come before the text to be encoded, and that text.
        self._windows: list[dict[int, tuple[int, str]]] = [{} for _ in items]
        for number, (_, text, spans) in enumerate(items):
            for cut in {cut for span in spans for cut in span if 0 < cut < len(text)}:
                token, start, _ = next((split for split in splits[number] if split[2] <= cut), (0, 0, 0))
                self._windows[number][cut] = (token, text[start:cut])
        windows = {window for each in self._windows for _, window in each.values()}
        if continued:
            self._encoded = encode_continuations(tokenizer, [*texts, *windows])
            self.whole = [self._encoded[text] for text in texts]
        else:
            distinct = list(windows)
            self._encoded = dict(zip(distinct, _encode(tokenizer, distinct, special=False), strict=True))
        # The unknown token stands for any text, so there equal ids do not show that what follows is apart.
        tails = {
            (number, start): items[number][1][start:]
            for number, each in enumerate(items)
            for start, _ in each[2]
            if tokenizer.unk_token_id in self.prefix(number, start)[-1:]
        }
        continuations = encode_continuations(tokenizer, tails.values())
        self._tails = {place: continuations[tail] for place, tail in tails.items()}

    def prefix(self, number: int, cut: int) -> list[int]:
        """The ids of text ``number`` up to the character ``cut``."""
        if not cut:
            return []
        if cut not in self._windows[number]:
            return self.whole[number]
        token, window = self._windows[number][cut]
        return [*self.whole[number][:token], *self._encoded[window]]

    def crossing(self, number: int) -> int:
        """The first span of text ``number`` whose beginning a token crosses; the number of spans if there is none."""
        whole, spans = self.whole[number], self._items[number][2]
        for place, (start, _) in enumerate(spans):
            given = self.prefix(number, start)
            follows = self._tails.get((number, start), whole[len(given) :])
            if whole[: len(given)] != given or whole[len(given) :] != follows:
                return place
        return len(spans)


def _splits(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encoding: BatchEncoding
) -> list[list[tuple[int, int, int]]]:
    """Where added tokens stand in each text, the last one first: number of the token, its first character, its end."""
    added = {
        number: str(token.content).strip()
        for number, token in tokenizer.added_tokens_decoder.items()
        if not token.single_word
    }
    found = []
    for place, text in enumerate(texts):
        ids = encoding["input_ids"][place]
        tokens = [number for number in reversed(range(len(ids))) if ids[number] in added]
        # Tokenizers in Python tell no offsets: there a prefix is encoded from the text's beginning.
        offsets = encoding.encodings[place].offsets if tokens and encoding.encodings else None
        found.append(
            [
                (number, *offsets[number])
                for number in tokens
                if text[slice(*offsets[number])].strip() == added[ids[number]]
            ]
            if offsets
            else []
        )
    return found


def _reach(tokenizer: PreTrainedTokenizerBase, ids: list[int], prefix: list[int]) -> int:
    """How many of ``ids`` it takes to hold the text of ``prefix``, whose text they begin with."""
    if ids[: len(prefix)] == prefix:
        return len(prefix)
    shared = min(len(ids), len(prefix))
    same = next((number for number in range(shared) if ids[number] != prefix[number]), shared)

    def length(tokens: list[int]) -> int:
        return len(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    wanted, end = length(prefix[same:]), min(same + 1, len(ids))
    while end < len(ids) and length(ids[same:end]) < wanted:
        end += 1
    return end


def _special_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer writes in front of every text."""
    (bare,), (whole,) = _encode(tokenizer, ["a"], special=False), _encode(tokenizer, ["a"], special=True)
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return whole[: places[0]] if places else []


def _without(front: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text's own ids, less what the tokenizer writes in front of them if they begin with that themselves."""
    if not front or ids[: len(front)] != front:
        return ids
    _tell_of_repetition("".join(tokenizer.convert_ids_to_tokens(front)))
    return ids[len(front) :]


@functools.cache
def _tell_of_repetition(written: str) -> None:
    logger.warning("prompts begin with %r, which the tokenizer writes itself: it stands there once", written)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # One call for all texts: fast tokenizers work through a batch in native threads.
    return tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
