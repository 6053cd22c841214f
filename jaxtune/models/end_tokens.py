"""The tokens that end an answer, as training teaches them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "an-answer"
_CONVERSATION = ({"role": "user", "content": "a-question"}, {"role": "assistant", "content": _ANSWER})


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What a model trained with this tokenizer writes at the end of an answer.

    That is the end-of-text token, which ends every example made from templates, and the token with which the chat
    template ends a turn. The two differ in a good many models: ChatML on a tokenizer whose end-of-text token is
    ``<|endoftext|>`` never writes that one.
    """
    found = (tokenizer.eos_token_id, turn_end(tokenizer))
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first token of its own that the chat template writes behind an assistant's answer.

    None where there is no template, where it ends a turn in plain text, and where it refuses a question and an answer.
    """
    try:
        text: Any = tokenizer.apply_chat_template([dict(message) for message in _CONVERSATION], tokenize=False)
    except Exception:  # no template, or whatever the program in it may raise: the data's own messages tell more
        return None
    _, answer, tail = str(text).rpartition(_ANSWER)
    if not answer:
        return None
    places = {
        token: (tail.find(added.content), -len(added.content))
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.content.strip() and added.content in tail
    }
    return min(places, key=places.__getitem__, default=None)
