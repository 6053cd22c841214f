"""Text to token ids, so that what a prompt becomes in training is what it becomes in generation.

An example is encoded piece by piece: its prompt alone, then what follows it. So the prompt's ids are a prefix of the
example's by construction, and the boundary between what is given and what is learnt falls between two tokens whatever
the texts are. Encoding prompt and completion as one text would let a token grow over the boundary (``"Answer: "`` +
``"blue"`` gives a token ``" blue"`` that generation, which starts from the prompt's own ids, never sees).

A piece that follows another is encoded as a continuation. Some tokenizers (SentencePiece's dummy prefix) write a space
in front of every text; a completion encoded alone would begin with a space that running text does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

# Texts to put in front of a continuation, tried in this order: no tokenizer merges all of them with what follows.
_ANCHORS = (":", "\n", "a")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, rendered: bool = False
) -> list[list[int]]:
    """Token ids of texts that begin an example: prompts, or whole texts.

    Special tokens in front are the tokenizer's own choice; an end-of-text token that it appends is taken off again, as
    the text goes on.

    Args:
      tokenizer: a tokenizer of ``transformers``.
      texts: the texts.
      rendered: the texts come from a chat template, which has written the special tokens already.
    """
    encoded = _encode(tokenizer, texts, special=not rendered)
    end = special_id(tokenizer, "eos_token")
    if rendered or end is None or _encode(tokenizer, ["a"], special=True)[0][-1] != end:
        return encoded
    return [ids[:-1] for ids in encoded]


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of texts that follow other text, by text; each distinct text is encoded once."""
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


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # One call for all texts: fast tokenizers work through a batch in native threads.
    return tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
