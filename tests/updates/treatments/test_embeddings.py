"""Low-rank terms of the embedding table: PEFT's numbers and files, tied heads, and tables that files bring along."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, load_model, random_model, save_model
from jaxtune.models.decoder import split
from jaxtune.updates import UpdatePlan, merge_adapters, save_adapter
from jaxtune.updates.peft.load import load_adapters, read_adapter
from jaxtune.updates.treatments.low_rank import LowRankRule
from jaxtune.updates.treatments.low_rank_embedding import LowRankEmbeddingRule

UNTIED = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
TIED = dataclasses.replace(UNTIED, tie_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 6)).astype(np.int32)
TABLE = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(TIED, jax.random.key(0)), directory)
    return directory


def applied(model, read):
    params, adapters = read.plan.resolve(model).apply(split(model)[1], read.trainable, read.values, fixed=read.fixed)
    assert params is not None
    return np.asarray(model(TOKENS, adapters=adapters))


def test_what_peft_made_is_read_with_the_table_and_without_it_and_merges(base, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    model = load_model(base, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    targets = ["embed_tokens", "v_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, lora_dropout=0.5, target_modules=targets, rank_pattern={"v_proj": 2}
    )
    made = peft.get_peft_model(theirs, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        expected = made.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()
    assert np.abs(expected - np.asarray(model(TOKENS))).max() > 0.1
    for table in (False, True):
        made.save_pretrained(tmp_path, save_embedding_layers=table)
        assert (TABLE in load_file(tmp_path / "adapter_model.safetensors")) == table
        read = read_adapter(tmp_path, model)
        assert {rule.method for rule in read.plan.rules} == {"low_rank", "low_rank_embedding"}
        np.testing.assert_allclose(applied(model, read), expected, rtol=1e-4, atol=1e-4)
    # Beside other adapters it is one of several.
    ours = load_adapters({"one": tmp_path}, model)["one"]
    np.testing.assert_allclose(model(TOKENS, adapters=ours[1]), expected, rtol=1e-4, atol=1e-4)
    # The head of the merged model has the table as it was.
    merged = merge_adapters(model, read.plan.resolve(model), read.trainable, read.values)
    assert not merged.config.tie_embeddings
    np.testing.assert_allclose(merged(TOKENS), expected, rtol=1e-4, atol=1e-4)
    save_model(merged, tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        np.testing.assert_allclose(whole(torch.from_numpy(TOKENS).long()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_table_that_is_not_the_model_s(base, tmp_path):
    model = load_model(base, dtype="float32")
    plan = UpdatePlan([LowRankEmbeddingRule(match="embed", rank=2)]).resolve(model)
    save_adapter(tmp_path, plan, plan.init(jax.random.key(0), split(model)[1]), {}, model, str(base))
    file = tmp_path / "adapter_model.safetensors"
    tensors, table = load_file(file), np.asarray(split(model)[1]["embed.table"])
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_embedding_A", "lora_embedding_B"}
    for other, message in (
        (table, None),
        (table + 0.1, "base_layer.weight is another table than the model's"),
        (table[:40], r"base_layer.weight has shape \(40, 16\), and the model's has \(48, 16\)"),
    ):
        save_file({**tensors, TABLE: other}, file)
        if message is None:
            read_adapter(tmp_path, model)
        else:
            with pytest.raises(UserError, match=message):
                read_adapter(tmp_path, model)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["embed_tokens"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(UserError, match="lora_embedding_A belongs to no linear layer"):
        read_adapter(tmp_path, model)


def test_a_family_s_factor_is_on_the_term_and_the_start_is_zero():
    config = dataclasses.replace(UNTIED, embedding_scale=4.0)
    model = random_model(config, jax.random.key(0))
    plan = UpdatePlan([LowRankEmbeddingRule(match="embed", rank=3, alpha=6.0)]).resolve(model, {"update.0.rank": 5})
    params = split(model)[1]
    trainable = plan.init(jax.random.key(0), params)
    a, b = (trainable["low_rank_embedding"]["embed"][name] for name in "ab")
    assert not np.any(a)
    assert float(jnp.std(b)) == pytest.approx(1.0, rel=0.2)
    a = jnp.ones_like(a) * 0.1
    adapter: Any = plan.apply(params, {"low_rank_embedding": {"embed": {"a": a, "b": b}}}, {}, jnp.uint32(1))[1][
        "embed"
    ]
    assert adapter.dropout_rate is None
    expected = 4.0 * (np.asarray(params["embed.table"])[TOKENS] + 2.0 * 0.1 * np.asarray(b[:3]).sum(0))
    np.testing.assert_allclose(
        model._embedded(jnp.asarray(TOKENS), jnp.zeros((2, 6), jnp.int32), adapter), expected, rtol=1e-4, atol=1e-5
    )


def test_other_methods_say_what_serves_the_table():
    with pytest.raises(UserError, match=r"has only embed\.table; use method 'full' or 'low_rank_embedding' for these"):
        UpdatePlan([LowRankRule(match="embed")]).resolve(UNTIED)
    with pytest.raises(UserError, match=r"its head is tied to embed\.table, .* 'full'"):
        UpdatePlan([LowRankRule(match="lm_head")]).resolve(TIED)
