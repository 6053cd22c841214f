"""Texts in, texts out, against greedy decoding by hand; and how often it compiles."""

from __future__ import annotations

import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.errors import UserError
from jaxtune.evaluation import continuation
from jaxtune.evaluation.generation import Generator
from jaxtune.models import LowRankAdapter, load_model, load_tokenizer, split
from tests.tiny_task import WORDS


@pytest.fixture(scope="module")
def opened(tiny_model):
    return load_model(tiny_model, dtype="float32"), load_tokenizer(tiny_model)


def by_hand(model, tokenizer, text, count, **adapters):
    """The likeliest token, again and again, in rows of one length so that little is compiled."""
    ids = tokenizer.encode(text)
    for _ in range(count):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(ids)] = ids
        logits = model(row, segment_ids=(np.arange(16)[None] < len(ids)).astype(np.int32), **adapters)
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(tokenizer.encode(text)) :], skip_special_tokens=True)


def test_texts_are_those_of_the_model_and_of_what_was_trained(opened, monkeypatch):
    generators = []

    class Kept(Generator):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            generators.append(self)

    monkeypatch.setattr(continuation, "Generator", Kept)
    model, tokenizer = opened
    prompts = [" ".join(WORDS[:3]), WORDS[7]]
    found = jaxtune.generate(model, tokenizer, prompts, max_new_tokens=3)
    assert found == [by_hand(model, tokenizer, prompt, 3) for prompt in prompts]
    generator = np.random.default_rng(0)
    arrays = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 32, 2), (2, 2, 32)))
    adapters = {"layers.attention.q": LowRankAdapter(*map(jnp.asarray, arrays), jnp.ones(2))}
    params = split(model)[1]
    tuned = jaxtune.generate(model, tokenizer, prompts, (params, adapters), max_new_tokens=3)
    assert tuned == [by_hand(model, tokenizer, prompt, 3, adapters=adapters) for prompt in prompts]
    assert tuned != found
    # Another state of the same model, in another call, compiles nothing: one program is without adapters, one with.
    doubled = {path: dataclasses.replace(each, scale=2 * each.scale) for path, each in adapters.items()}
    jaxtune.generate(model, tokenizer, prompts, (params, doubled), max_new_tokens=3)
    assert [generator.compilations for generator in generators] == [2]


def test_what_cannot_be_continued_is_told(opened):
    model, tokenizer = opened
    for options, message in (
        ({"prompts": WORDS[0]}, "prompts: a list of texts is needed"),
        ({"prompts": [" ".join(WORDS * 2)]}, r"prompt 0 takes \d+ tokens, more than the model's context of 64"),
        ({"prompts": [WORDS[0]], "max_new_tokens": 0}, r"max_new_tokens \(0\) and batch_size \(32\) must be"),
        ({"prompts": [WORDS[0]], "top_p": 2.0}, "top_p must be above 0"),
        ({"prompts": [WORDS[0]], "chat": True}, "chat"),
    ):
        with pytest.raises(UserError, match=message):
            jaxtune.generate(model, tokenizer, **options)
    assert jaxtune.generate(model, tokenizer, []) == []


def test_a_chat_is_put_through_the_template_and_ends_at_its_stop(opened):
    model, tokenizer = opened
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' : ' }}{% endfor %}"
    turns = jaxtune.generate(model, tokenizer, WORDS[:8], chat=True, max_new_tokens=3)
    assert turns == jaxtune.generate(model, tokenizer, [f"{word} : " for word in WORDS[:8]], max_new_tokens=3)
    place, words = next((place, turn.split()) for place, turn in enumerate(turns) if len(turn.split()) > 1)
    stopped = jaxtune.generate(model, tokenizer, WORDS[:8], chat=True, max_new_tokens=3, stop=words[1])
    assert stopped[place] == turns[place].split(words[1])[0]
