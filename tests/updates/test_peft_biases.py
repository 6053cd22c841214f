"""Biases that are trained beside a LoRA: PEFT's ``bias``, read and written."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, load_model, random_model, save_model
from jaxtune.models.decoder import split
from jaxtune.updates import UpdatePlan, load_adapters, merge_adapters, save_adapter
from jaxtune.updates.peft.load import read_adapter
from jaxtune.updates.treatments.bitfit import BitFitRule
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule

CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 6)).astype(np.int32)
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(CONFIG, jax.random.key(0)), directory)
    return directory


def written(directory, read, model, base):
    """Names of the tensors of an adapter that is written again, and its configuration."""
    save_adapter(directory, read.plan.resolve(model), read.trainable, read.values, model, str(base), None, read.fixed)
    return load_file(directory / FILE), json.loads((directory / "adapter_config.json").read_text())


@pytest.mark.parametrize("bias", [pytest.param("lora_only", marks=pytest.mark.slow), "all"])
def test_what_peft_made_is_read_and_written_again(bias, base, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    made = peft.get_peft_model(
        theirs, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj", "up_proj"], bias=bias)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
        expected = made.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()
    made.save_pretrained(tmp_path)
    model = load_model(base, dtype="float32")
    read = read_adapter(tmp_path, model)
    merged = merge_adapters(model, read.plan.resolve(model), read.trainable, read.values)
    np.testing.assert_allclose(merged(TOKENS), expected, rtol=1e-3, atol=1e-3)
    ours, config = written(tmp_path / "again", read, model, base)
    there = load_file(tmp_path / FILE)
    assert config["bias"] == bias
    assert {name for name in ours if name.endswith("bias")}
    assert ours.keys() == there.keys()
    for name, value in there.items():
        np.testing.assert_array_equal(ours[name], value)
    with pytest.raises(UserError, match=r"it also changes layers\.attention"):
        load_adapters({"one": tmp_path}, model)
    save_file({name: value for name, value in there.items() if "bias" not in name}, tmp_path / FILE)
    with pytest.raises(UserError, match=f"bias is '{bias}', but no bias has a tensor"):
        read_adapter(tmp_path, model)


@pytest.mark.parametrize(
    ("first", "ends", "bias"),
    [
        # All of them; of one layer of what is adapted; beside modules that are saved whole, which keep theirs.
        ([BitFitRule(match="**.bias")], {"q_proj.base_layer.bias", "k_proj.bias", "v_proj.bias"}, "all"),
        ([FullRule(match="layers.1.attention.q.bias")], {"1.self_attn.q_proj.base_layer.bias"}, "lora_only"),
        (
            [FullRule(match="layers.*.attention.k"), BitFitRule(match="layers.*.attention.q.bias")],
            {"q_proj.base_layer.bias", "k_proj.bias"},
            "lora_only",
        ),
        ([BitFitRule(match="layers.*.attention.k.bias")], {"k_proj.bias"}, "none"),
    ],
)
def test_biases_of_a_plan(first, ends, bias, random_trainable, tmp_path):
    model = random_model(CONFIG, jax.random.key(0))
    plan = UpdatePlan([*first, LowRankRule(match="layers.*.attention.q", rank=2)]).resolve(model)
    assert plan.exports
    trainable = random_trainable(jax.eval_shape(plan.init, jax.random.key(0), split(model)[1]))
    save_adapter(tmp_path, plan, trainable, {}, model, "base")
    names = [name for name in load_file(tmp_path / FILE) if name.endswith("bias")]
    assert names
    assert {end for end in ends for name in names if name.endswith(end)} == ends
    assert all(any(name.endswith(end) for end in ends) for name in names)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == bias
    read = read_adapter(tmp_path, model)
    again = written(tmp_path / "again", read, model, "base")
    assert again[1] == json.loads((tmp_path / "adapter_config.json").read_text())
    for name, value in load_file(tmp_path / FILE).items():
        np.testing.assert_array_equal(again[0][name], value)
