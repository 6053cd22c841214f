"""Generation against transformers on torch, and what it may not depend on: batches, padding, mesh, values."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.errors import UserError
from jaxtune.evaluation.generation import Generator, prompt_bucket
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import split
from jaxtune.models.linear import LowRankAdapter
from jaxtune.models.loading import load_model, random_model
from jaxtune.models.tokenizer import load_tokenizer

NEW = 12
LENGTHS = (3, 29, 1, 17, 30, 8)  # one bucket, two batches; longer than the windows below
VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Wide enough that the likeliest token is likelier by far more than rounding.
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    # Random tied embeddings, scaled as Gemma's are, say the last token again for ever.
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
}


def make_prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size=length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def tiny():
    """A small random Llama, its static part and parameters."""
    config = DecoderConfig(
        "llama", VOCAB, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, initializer_range=0.4
    )
    model = random_model(config, jax.random.key(0), dtype=jnp.float32)
    return model, *split(model)


def make_generator(static, **changes):
    settings = {"max_new_tokens": NEW, "batch_size": 4, "eos_ids": (), "pad_id": 0}
    return Generator(static, **(settings | changes))


def make_adapters(seed, rank=4):
    """Adapters of q and down large enough to change the generated text."""
    keys = iter(jax.random.split(jax.random.key(seed), 4))

    def adapter(inputs, outputs):
        a, b = jax.random.normal(next(keys), (2, inputs, rank)), jax.random.normal(next(keys), (2, rank, outputs))
        return LowRankAdapter(a, b, jnp.full((2,), 0.05))

    return {"layers.attention.q": adapter(32, 32), "layers.mlp.down": adapter(48, 32)}


def without_cache(model, prompt, count, adapters=None):
    """Greedy tokens by a whole forward pass for each, in one compiled shape."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        tokens[0, end] = int(model(tokens, adapters=adapters)[0, end - 1].argmax())
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config_class, model_class, further = FAMILIES[family]
    config = getattr(transformers, config_class)(**SIZES, **further)
    reference = getattr(transformers, model_class)(config).eval()
    reference.save_pretrained(tmp_path)
    expected = []
    prompts = make_prompts()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )[0, len(prompt) :].tolist()
        expected.append(output[: output.index(2)] if 2 in output else output)
    assert any(len(set(answer)) > 3 for answer in expected), "the reference repeats one token: nothing is compared"
    static, params = split(load_model(tmp_path, dtype=jnp.float32))
    generator = make_generator(static, eos_ids=(2,))
    assert generator(params, None, prompts) == expected
    assert generator.compilations == 1


def test_babyllama_continues_as_its_readme_says(babyllama):
    tokenizer = load_tokenizer(babyllama)
    static, params = split(load_model(babyllama, dtype=jnp.float32))
    expected = (
        ", there was a little girl named Lily. She loved to play outside in the sunshine. "
        "One day, she went to the park with her"
    )
    prompts = [tokenizer("Once upon a time")["input_ids"], tokenizer("Tom and his dog")["input_ids"]]
    generator = make_generator(static, max_new_tokens=120, batch_size=2, eos_ids=(tokenizer.eos_token_id,))
    answers = generator(params, None, prompts)
    # Decoded with its prompt, as a text of its own would lose its first space.
    assert tokenizer.decode(prompts[0] + answers[0], skip_special_tokens=True).startswith("Once upon a time" + expected)


def test_cache_and_padding_do_not_change_the_tokens(tiny):
    """Against whole forward passes without cache, with adapters that change the answer."""
    model, static, params = tiny
    adapters = make_adapters(0)
    prompts = make_prompts((3, 40, 1, 17, 33, 8))
    generator = make_generator(static)
    expected = [without_cache(model, prompt, NEW, adapters) for prompt in prompts]
    assert generator(params, adapters, prompts) == expected
    assert generator.compilations == 2, "one for each bucket"
    assert without_cache(model, prompts[0], NEW) != expected[0]


def test_batch_size_and_order_do_not_change_the_tokens(tiny):
    _, static, params = tiny
    prompts = make_prompts()
    expected = make_generator(static)(params, None, prompts)
    assert make_generator(static, batch_size=2)(params, None, prompts) == expected
    assert make_generator(static)(params, None, prompts[::-1]) == expected[::-1]
    assert make_generator(static)(params, None, []) == []


def test_sixteen_trials_share_one_program(tiny):
    """By our counter, and by the compilations that jax itself reports."""
    _, static, params = tiny
    generator = make_generator(static, eos_ids=(2,))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    trials = [make_adapters(trial) for trial in range(16)]
    prompts = make_prompts((5, 9, 30, 31))
    compiled.clear()
    first = generator(params, trials[0], prompts)
    assert compiled, "jax reports no compilation: the test could not fail"
    compiled.clear()
    answers = {str(first)} | {str(generator(params, adapters, prompts)) for adapters in trials[1:]}
    assert len(answers) > 8
    assert (generator.compilations, compiled) == (1, [])


def test_answers_end_at_eos_and_stop_tokens(tiny):
    _, static, params = tiny
    prompts = make_prompts()
    free = make_generator(static)(params, None, prompts)
    eos, stop = free[0][4], free[1][2]
    answers = make_generator(static, eos_ids=(eos,), stop_ids=(stop, VOCAB + 5))(params, None, prompts)
    for answer, full in zip(answers, free, strict=True):
        ends = [place for place, token in enumerate(full) if token in (eos, stop)]
        expected = full if not ends else full[: ends[0] + (full[ends[0]] == stop)]
        assert answer == expected
    assert stop in answers[1]
    assert eos not in answers[0]


def test_decoding_stops_when_every_row_has_ended(tiny):
    """With every token an end, the loop does not run at all, whatever max_new_tokens is."""
    _, static, params = tiny
    generator = make_generator(static, max_new_tokens=500, eos_ids=range(VOCAB))
    generator(params, None, make_prompts((5,)))
    start = time.perf_counter()
    assert generator(params, None, make_prompts((5,))) == [[]]
    ended = time.perf_counter() - start
    generator.eos_ids = frozenset()
    start = time.perf_counter()
    assert len(generator(params, None, make_prompts((5,)))[0]) == 500
    assert ended < (time.perf_counter() - start) / 3
    assert generator.compilations == 1


def test_a_mesh_gives_the_same_tokens(tiny, mesh):
    model, static, params = tiny
    prompts = make_prompts()
    adapters = make_adapters(1)
    alone = make_generator(static)
    expected = alone(params, adapters, prompts)
    sharded = random_model(model.config, jax.random.key(0), mesh, dtype=jnp.float32)
    cut, cut_params = split(sharded)
    generator = make_generator(cut, mesh=mesh, batch_size=3)
    assert generator.batch_size == 4
    assert generator(cut_params, adapters, prompts) == expected
    assert generator.compilations == 1
    states = [adapters, make_adapters(2), make_adapters(3)]
    beside = [expected, *(alone(params, state, prompts) for state in states[1:])]
    assert generator.side_by_side(cut_params, stacked(states), [prompts] * 3) == beside


def stacked(states):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def own_prompts(*lengths):
    return [make_prompts(each, seed) for seed, each in enumerate(lengths)]


def test_states_side_by_side_give_the_tokens_that_each_gives_by_itself(tiny):
    """Other scales, another end for each row, other numbers of prompts; however few states have any, one program."""
    _, static, params = tiny
    states = [make_adapters(seed, rank=8) for seed in range(5)]
    for factor, state in enumerate(states):
        a, b = (jax.random.normal(jax.random.key(factor), shape) for shape in ((32, 8), (8, VOCAB)))
        state["lm_head"] = LowRankAdapter(a, b, jnp.float32(0.02 * factor))
    prompts = own_prompts((3, 29, 1, 17, 30, 8, 9), (5, 5), (20,), (), (31, 2, 7))
    alone, generator = make_generator(static), make_generator(static, batch_size=10)
    free = alone(params, states[0], prompts[0])
    for each in (alone, generator):
        each.eos_ids, each.stop_ids = frozenset({free[0][3], free[1][6]}), frozenset({free[2][5]})
    expected = [alone(params, state, each) for state, each in zip(states, prompts, strict=True)]
    lengths = {len(answer) for each in expected for answer in each}
    assert len(lengths) > 3, "all answers end alike: nothing of their ends is compared"
    assert [make_generator(static, batch_size=size).groups(5) for size in (3, 10, 64)] == [(3, 1), (5, 2), (5, 12)]
    assert generator.side_by_side(params, stacked(states), prompts) == expected
    others = stacked([states[4], *states[:4]])
    assert generator.side_by_side(params, others, [prompts[4], prompts[0]]) == [expected[4], expected[0]]
    assert generator.side_by_side(params, stacked(states), prompts[:1]) == expected[:1]
    assert generator.side_by_side(params, stacked(states), []) == []
    assert generator.compilations == 1


def test_states_side_by_side_pad_a_prompt_as_their_own_prompts_ask(tiny):
    """Two padded lengths, two programs; a state whose prompts are short is never computed at another's length."""
    _, static, params = tiny
    states, prompts = [make_adapters(seed) for seed in range(3)], own_prompts((40, 3, 33, 8), (4, 9, 6), (7,))
    alone, generator = make_generator(static), make_generator(static, batch_size=2)
    assert generator.groups(3) == (2, 1), "fewer than states"
    expected = [alone(params, state, each) for state, each in zip(states, prompts, strict=True)]
    assert generator.side_by_side(params, stacked(states), prompts) == expected
    assert generator.compilations == 2
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generator.side_by_side(params, stacked(states), [prompts[0], [[1], []]])


def test_sampling_is_repeatable_and_independent_of_batches(tiny):
    _, static, params = tiny
    prompts = make_prompts((6, 6, 20, 3))
    prompts[1] = prompts[0]
    first = make_generator(static)(params, None, prompts, temperature=1.0, seed=1)
    assert first[0] != first[1], "equal prompts have draws of their own"
    assert make_generator(static, batch_size=2)(params, None, prompts, temperature=1.0, seed=1) == first
    assert make_generator(static)(params, None, prompts, temperature=1.0, seed=2) != first


def test_sampling_that_leaves_one_token_is_greedy(tiny):
    _, static, params = tiny
    prompts = make_prompts()
    generator = make_generator(static)
    greedy = generator(params, None, prompts)
    assert generator(params, None, prompts, temperature=5.0, top_k=1) == greedy
    assert generator(params, None, prompts, temperature=5.0, top_p=1e-6) == greedy
    assert generator(params, None, prompts, temperature=1e-4) == greedy
    assert generator(params, None, prompts, temperature=5.0) != greedy
    assert generator.compilations == 2, "one greedy program, one that samples, whatever its settings"


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, f"token id {VOCAB}.*vocabulary has {VOCAB}"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"temperature": 1.0, "top_k": -1}, "top_k"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p"),
    ],
)
def test_wrong_input_is_named(tiny, prompts, settings, message):
    _, static, params = tiny
    with pytest.raises(UserError, match=message):
        make_generator(static)(params, None, prompts, **settings)


@given(st.integers(1, 20_000))
def test_buckets_fit_and_waste_little(length):
    bucket = prompt_bucket(length)
    assert length <= bucket
    assert bucket == 32 or bucket < (1.5 if length > 64 else 2) * length
    assert prompt_bucket(bucket) == bucket


def test_buckets_are_few():
    assert sorted({prompt_bucket(length) for length in range(1, 513)}) == [32, 64, 96, 128, 192, 256, 384, 512]


def test_the_context_is_told_or_refused(tiny, caplog):
    _, static, params = tiny
    generator = make_generator(static, context=24, max_new_tokens=4)
    assert len(generator(params, None, make_prompts((21, 5)))[0]) == 4
    assert not caplog.records
    for _ in range(2):
        assert len(generator(params, None, make_prompts((22,)))[0]) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "a prompt of 22 tokens and 4 new ones may get beyond the model's context of 24 positions, which it was not "
        "made for"
    ]
    with pytest.raises(UserError, match="prompt 1 takes 25 tokens, more than the model's context of 24 positions"):
        generator(params, None, make_prompts((3, 25)))
