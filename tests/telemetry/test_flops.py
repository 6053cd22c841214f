import jax
import jax.numpy as jnp
import pytest

from jaxtune.models import DecoderConfig
from jaxtune.telemetry.flops import step_flops

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=20,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
# q, k, v, o, gate, up, down of one layer, and the head.
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20
MATRICES = 3 * LAYER + 8 * 100


def attention(length: int) -> float:
    """Forward: queries with keys, scores with values, over half of the square."""
    return 3 * 2 * 2 * 2 * 4 * length * length / 2


def test_a_frozen_model_costs_forward_and_activation_gradients():
    flops = step_flops(CONFIG, tokens=16, sequence_length=16)
    assert flops.forward == pytest.approx(16 * 2 * MATRICES + attention(16))
    assert flops.backward == pytest.approx(16 * 2 * MATRICES + 2 * attention(16))


def test_what_is_trained_adds_its_own_gradient():
    frozen = step_flops(CONFIG, tokens=16, sequence_length=16)
    full = step_flops(CONFIG, tokens=16, sequence_length=16, full={"layers.mlp.up.kernel": 1.0, "lm_head.kernel": 1.0})
    assert full.total - frozen.total == pytest.approx(16 * 2 * (3 * 8 * 20 + 8 * 100))
    added = step_flops(
        CONFIG,
        tokens=16,
        sequence_length=16,
        added={
            "layers.attention.q": 4.0
            * 2
            * (CONFIG.hidden_size + CONFIG.num_heads * CONFIG.head_dim)
            * CONFIG.num_layers
        },
    )
    assert added.total - frozen.total == pytest.approx(16 * 3 * 2 * 4 * (8 + 8) * 3)


def test_a_window_cuts_the_square():
    narrow = DecoderConfig(
        **{**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__}, "windows": (4, None, None)}
    )
    saved = (
        step_flops(CONFIG, tokens=16, sequence_length=16).forward
        - step_flops(narrow, tokens=16, sequence_length=16).forward
    )
    assert saved == pytest.approx(2 * 2 * 2 * 4 * (16 * 16 / 2 - (4 * 12 + 4 * 4 / 2)))


def test_the_forward_count_agrees_with_xla():
    """XLA counts the whole square of attention, and elementwise work: with short rows the two agree."""
    from jaxtune.models import random_model

    model = random_model(CONFIG, jax.random.key(0))
    # Unscanned, as XLA counts a scan's body once: one layer.
    one = DecoderConfig(
        **{**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__}, "num_layers": 1, "windows": ()}
    )
    model = random_model(one, jax.random.key(0))
    tokens = jnp.ones((4, 8), jnp.int32)
    counted = jax.jit(lambda t: model(t)).lower(tokens).compile().cost_analysis()["flops"]
    ours = step_flops(one, tokens=32, sequence_length=8).forward
    assert ours <= counted <= 1.35 * ours
