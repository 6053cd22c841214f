"""Generation with the key-value cache gives the logits of the whole text at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.cache import Cache, init_cache
from jaxtune.models.config import DecoderConfig, RopeConfig
from jaxtune.models.declarations import random_params
from jaxtune.models.decoder import Decoder, merge, split
from jaxtune.models.linear import LowRankAdapter

CONFIGS = {
    "global": {},
    "mixed windows": {"windows": (4, None, 4), "local_rope": RopeConfig(theta=50.0), "attention_soft_cap": 3.0},
    "windows": {"windows": (4, 4, 4), "qk_norm": True, "tie_embeddings": True},
}
PROMPTS = [[5, 9, 2, 30, 11, 8, 7], [17, 3, 3]]
CONTINUATIONS = [[1, 44, 6, 13, 20], [9, 9, 31, 2, 40]]


def decoder(fields: dict) -> Decoder:
    config = DecoderConfig("test", 47, 24, 32, 3, 4, 2, 8, initializer_range=0.3, **fields)
    return Decoder(config, random_params(config, jax.random.key(0)))


def left_padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    tokens = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
    return tokens, np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int32)


def extended(model: Decoder, tokens, cache: Cache, segment_ids=None, adapters=None) -> tuple[jax.Array, Cache]:
    states, cache = model.extend(tokens, cache, segment_ids, adapters=adapters)
    return model.logits(states, adapters=adapters), cache


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_steps_equal_the_whole_text(name: str) -> None:
    model = decoder(CONFIGS[name])
    tokens, segment_ids = left_padded(PROMPTS)
    cache = init_cache(model.config, 2, 16)
    prefill, cache = extended(model, tokens, cache, segment_ids)
    steps = []
    for step in range(len(CONTINUATIONS[0])):
        logits, cache = extended(model, np.array([[row[step]] for row in CONTINUATIONS], np.int32), cache)
        steps.append(np.asarray(logits[:, 0]))

    for row, (prompt, continuation) in enumerate(zip(PROMPTS, CONTINUATIONS, strict=True)):
        whole = np.asarray(model(np.array([prompt + continuation], np.int32)))[0]
        assert np.abs(whole).max() > 1
        np.testing.assert_allclose(np.asarray(prefill)[row, -len(prompt) :], whole[: len(prompt)], atol=2e-5)
        np.testing.assert_allclose(np.stack(steps)[:, row], whole[len(prompt) :], atol=2e-5)
    assert cache.lengths.tolist() == [len(p) + len(c) for p, c in zip(PROMPTS, CONTINUATIONS, strict=True)]
    assert int(cache.index) == tokens.shape[1] + len(CONTINUATIONS[0])


def test_several_tokens_may_be_written_at_once() -> None:
    model = decoder(CONFIGS["mixed windows"])
    tokens = np.array([PROMPTS[0] + CONTINUATIONS[0]], np.int32)
    _, cache = model.extend(tokens[:, :7], init_cache(model.config, 1, 12))
    logits, cache = extended(model, tokens[:, 7:], cache)
    np.testing.assert_allclose(logits, model(tokens)[:, 7:], atol=2e-5)
    assert int(cache.index) == cache.slots == 12


def test_steps_run_inside_a_loop_with_adapters() -> None:
    model = decoder(CONFIGS["mixed windows"])
    static, params = split(model)
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((3, 24, 2), (3, 2, 32)))
    adapters = {"layers.attention.q": LowRankAdapter(a, b, jnp.full(3, 0.5))}
    tokens = np.array([CONTINUATIONS[0]], np.int32)

    @jax.jit
    def run(params: dict, cache: Cache) -> jax.Array:
        def step(cache: Cache, token: jax.Array) -> tuple[Cache, jax.Array]:
            logits, cache = extended(merge(static, params), token[None, None], cache, adapters=adapters)
            return cache, logits[0, 0]

        return jax.lax.scan(step, cache, jnp.asarray(tokens[0]))[1]

    whole = model(tokens, adapters=adapters)[0]
    np.testing.assert_allclose(run(params, init_cache(model.config, 1, 5)), whole, atol=2e-5)
    assert not np.allclose(whole, model(tokens)[0], atol=1e-2)


def test_a_bfloat16_cache_keeps_its_dtype() -> None:
    config = decoder({}).config
    model = Decoder(config, random_params(config, jax.random.key(0), jnp.bfloat16))
    cache = init_cache(config, 1, 8, jnp.bfloat16)
    _, after = model.extend(np.ones((1, 4), np.int32), cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


@pytest.mark.parametrize("shape", [(3, 4), (2, 17)])
def test_tokens_that_do_not_fit_are_named(shape: tuple[int, int]) -> None:
    model = decoder({})
    with pytest.raises(ValueError, match="2 rows × 16 slots"):
        model.extend(np.zeros(shape, np.int32), init_cache(model.config, 2, 16))
