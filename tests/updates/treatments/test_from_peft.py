"""Adapters that PEFT itself made, of each kind that has numbers of its own: read, and what PEFT computes with them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxtune.models import DecoderConfig, load_model, random_model, save_model
from jaxtune.updates import merge_adapters
from jaxtune.updates.peft.load import read_adapter

CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
MODULES = ["q_proj", "v_proj", "down_proj"]
KINDS = [
    ("MissConfig", {"r": 4}),
    ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    ("VeraConfig", {"r": 20, "save_projection": True}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(CONFIG, jax.random.key(0)), directory)
    return directory


@pytest.mark.parametrize(("kind", "numbers"), KINDS, ids=[kind for kind, _ in KINDS])
def test_what_peft_made_computes_the_same(kind, numbers, base, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    made = peft.get_peft_model(theirs, getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=MODULES, **numbers))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    made.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 6)).astype(np.int32)
    with torch.no_grad():
        expected = made.eval()(torch.from_numpy(tokens).long()).logits.numpy()
    model = load_model(base, dtype="float32")
    read = read_adapter(tmp_path, model)
    ours = merge_adapters(model, read.plan.resolve(model), read.trainable, read.values, read.fixed)(tokens)
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=2e-3, atol=2e-3)
    assert np.abs(expected - np.asarray(model(tokens))).max() > 0.1, "the adapter did nothing"
