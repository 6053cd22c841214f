"""Texts in, texts out, against greedy decoding by hand; and how often it compiles."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.errors import UserError
from jaxtune.evaluation import continuation
from jaxtune.evaluation.generation import Generator
from jaxtune.models import LowRankAdapter, load_model, load_tokenizer, split
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.low_rank import LowRankRule
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


@pytest.fixture(scope="module")
def two_adapters(opened, tmp_path_factory):
    """Directories of two adapters of other modules, ranks and layers."""
    folder, (model, _) = tmp_path_factory.mktemp("adapters"), opened
    generator = np.random.default_rng(5)
    for name, match, rank in (("one", "layers.*.attention.{q,o}", 2), ("other", "layers.1.{attention.q,mlp.up}", 3)):
        plan = UpdatePlan([LowRankRule(match=match, rank=rank, alpha=4 * rank)]).resolve(model)
        shapes = jax.eval_shape(plan.init, jax.random.key(0), split(model)[1])
        arrays = jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape), jnp.float32), shapes)
        jaxtune.save_adapter(folder / name, plan, arrays, {}, model, "base")
    return {name: folder / name for name in ("one", "other")}


def test_each_row_is_answered_by_its_adapter(opened, two_adapters):
    model, tokenizer = opened
    adapters = jaxtune.load_adapters(two_adapters, model)
    assert list(adapters) == ["one", "other"]
    prompts = [" ".join(WORDS[start : start + 3]) for start in range(4)]
    names = ["other", None, "one", "one"]
    found = jaxtune.generate(model, tokenizer, prompts, adapters, adapter_names=names, max_new_tokens=2)
    # Of each adapter by itself, unpadded: as it is read alone.
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        applied = {}
        if name is not None:
            plan, trainable, values = jaxtune.load_adapter(two_adapters[name], model)
            applied = {"adapters": plan.resolve(model).apply(split(model)[1], trainable, values)[1]}
        expected.append(by_hand(model, tokenizer, prompt, 2, **applied))
    assert found == expected
    assert len(set(found)) > 2
    # One at a time: the same, and changing to another one compiles nothing.
    for name in ("one", "other"):
        chosen = [row for row, of in enumerate(names) if of == name]
        asked = [prompts[row] for row in chosen]
        alone = jaxtune.generate(model, tokenizer, asked, adapters[name], max_new_tokens=2, batch_size=1)
        assert alone == [expected[row] for row in chosen]
    assert jax.tree.map(jnp.shape, adapters["one"][1]) == jax.tree.map(jnp.shape, adapters["other"][1])


def test_adapters_that_do_not_go_with_the_prompts_are_told(opened, two_adapters):
    model, tokenizer = opened
    adapters = jaxtune.load_adapters(two_adapters, model)
    for trained, names, temperature, message in (
        (adapters, ["ohter"], 0.0, "no adapter 'ohter'; did you mean 'other'"),
        (adapters, None, 0.0, "say which one answers"),
        (adapters, ["one", "one"], 0.0, "one for each of the 1 prompts"),
        (adapters, ["one"], 1.0, "decoded greedily"),
        (None, ["one"], 0.0, "they name adapters of jaxtune.load_adapters"),
    ):
        with pytest.raises(UserError, match=message):
            jaxtune.generate(model, tokenizer, [WORDS[0]], trained, adapter_names=names, temperature=temperature)
    with pytest.raises(KeyError):
        adapters["none"]
    with pytest.raises(UserError, match="at least one"):
        jaxtune.load_adapters({}, model)
    with pytest.raises(UserError, match="no such adapter directory"):
        jaxtune.load_adapters({"x": two_adapters["one"] / "none"}, model)


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
