"""Examples that share a row never see each other: checked at the model's output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_examples import make

from jaxtune.data.packing import first_fit, make_batch
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import Decoder
from jaxtune.models.loading import random_model

LENGTHS = [9, 14, 3, 20, 2, 11, 7, 5]
SEQUENCE_LENGTH = 32


@pytest.fixture(scope="module", params=[(), (4, None)], ids=["global", "windows"])
def model(request: pytest.FixtureRequest) -> Decoder:
    config = DecoderConfig(
        family="llama",
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        windows=request.param,
        # Large weights, so that attention looks at single tokens and a leak is large too.
        initializer_range=0.3,
    )
    return random_model(config, jax.random.key(0), dtype=jnp.float32)


def logits(model: Decoder, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(model(batch["tokens"], batch["positions"], batch["segment_ids"]))


def test_packed_logits_are_the_separate_ones(model: Decoder):
    examples = make(LENGTHS)
    rows = first_fit(np.asarray(LENGTHS) - 1, SEQUENCE_LENGTH)
    assert max(len(row) for row in rows) > 2
    packed = make_batch(examples, rows, SEQUENCE_LENGTH)
    apart = make_batch(examples, [[place] for place in range(len(examples))], SEQUENCE_LENGTH)
    packed_logits, apart_logits = logits(model, packed), logits(model, apart)
    for example in examples:
        here = packed_logits[packed["example_ids"] == example.index]
        there = apart_logits[apart["example_ids"] == example.index]
        assert here.shape == (len(example.tokens) - 1, 1000)
        np.testing.assert_allclose(here, there, atol=1e-5 * np.abs(there).max(), rtol=0)


def test_the_check_would_see_a_leak(model: Decoder):
    examples = make(LENGTHS)
    packed = make_batch(examples, [[0, 1]], SEQUENCE_LENGTH)
    merged = {**packed, "segment_ids": np.minimum(packed["segment_ids"], 1)}
    second = packed["example_ids"] == examples[1].index
    assert np.abs(logits(model, packed)[second] - logits(model, merged)[second]).max() > 0.1
