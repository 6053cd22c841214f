"""Where a generated answer ends: stop strings, as tokens on the device and as text on the host."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, stop: str | None) -> frozenset[int]:
    """Tokens whose own text contains the stop string: once one is generated, so is the stop string.

    Generation may end there, which makes decoding short without any exchange with the host. It never ends too early. It
    ends too late where the stop string is spread over several tokens, which costs time only: the text is cut by
    :func:`answer_texts` in any case. A single-byte stop string, such as a line break, always lies within one token.
    """
    if not stop:
        return frozenset()
    texts = _decode(tokenizer, [[token] for token in range(len(tokenizer))])
    return frozenset(token for token, text in enumerate(texts) if stop in text)


def answer_texts(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]], stop: str | None = None
) -> list[str]:
    """The text of generated tokens, without special tokens, up to the stop string."""
    texts = _decode(tokenizer, answers)
    return [text.split(stop, 1)[0] for text in texts] if stop else texts


def _decode(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(
        [list(ids) for ids in sequences], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
