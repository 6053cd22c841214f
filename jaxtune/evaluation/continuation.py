"""Texts in, texts out: generation by one function call, which compiles once for calls alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
from flax import nnx
from transformers import PreTrainedTokenizerBase

from jaxtune.data import chat_prompt, encode_prompts, one_turn
from jaxtune.errors import UserError
from jaxtune.evaluation.generation import Generator
from jaxtune.evaluation.text import answer_texts, stop_token_ids
from jaxtune.models import Adapter, Decoder, Params, end_tokens, split


def generate(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    trained: tuple[Params, Mapping[str, Adapter]] | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Continues texts, as ``jaxtune generate`` does.

    Programs are kept: a call with the same model, ``max_new_tokens``, ``batch_size`` and ends as one before compiles
    only for prompts of another length (rounded up), whatever was trained in between.

    Args:
      model: the base.
      tokenizer: of the model.
      prompts: texts to continue, or, with ``chat``, what the user says.
      trained: what training makes of the model: ``trainer.apply(state)``. The model itself, if None.
      chat: whether each prompt is the user's turn, put through the tokenizer's chat template.
      max_new_tokens: most tokens generated for a prompt.
      temperature: 0 takes the likeliest token; above 0 logits are divided by it and a token is drawn.
      top_k: draw among the k likeliest tokens; 0 for all.
      top_p: draw among the fewest likeliest tokens whose probabilities sum to this; 1 for all.
      seed: of the draws.
      stop: an answer ends before this text, as at the end tokens of model, tokenizer and chat template.
      batch_size: rows that are computed at a time.

    Returns:
      The continuations, in the order of the prompts, without special tokens.

    Raises:
      UserError: there is no prompt, one is empty or longer than the model's context, a sampling setting is out of
        range, or ``chat`` is asked of a tokenizer without a template.
    """
    if isinstance(prompts, str):
        raise UserError("prompts: a list of texts is needed; put the one text into a list")
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
    texts = list(prompts)
    if chat:
        texts = [
            chat_prompt(one_turn(text), tokenizer, f"prompt {number}", key="chat") for number, text in enumerate(texts)
        ]
    static, params = split(model)
    generator = _generator(
        static,
        max_new_tokens,
        min(batch_size, max(len(texts), 1)),
        frozenset({*model.config.eos_token_ids, *end_tokens(tokenizer)}),
        stop_token_ids(tokenizer, stop),
        model.config.max_position_embeddings,
        model.mesh,
    )
    params, adapters = (params, {}) if trained is None else trained
    answers = generator(
        params,
        dict(adapters),
        encode_prompts(tokenizer, texts, rendered=chat),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return answer_texts(tokenizer, answers, stop)


@functools.lru_cache(maxsize=8)
def _generator(
    static: nnx.GraphDef[Decoder],
    max_new_tokens: int,
    batch_size: int,
    eos_ids: frozenset[int],
    stop_ids: frozenset[int],
    context: int,
    mesh: jax.sharding.Mesh | None,
) -> Generator:
    return Generator(
        static,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        eos_ids=eos_ids,
        pad_id=0,
        context=context,
        stop_ids=stop_ids,
        mesh=mesh,
    )
