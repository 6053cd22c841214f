"""Adapters that are not read: each fault is told, and where it is."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.errors import UserError
from jaxtune.models.decoder import split
from jaxtune.models.loading import load_model
from jaxtune.updates import UpdatePlan, load_adapter, save_adapter
from jaxtune.updates.treatments.low_rank import LowRankRule


@pytest.fixture
def adapter(checkpoint, random_trainable, tmp_path):
    """A sound adapter, to be spoilt: directory, model, and functions that change its configuration and its tensors."""
    model = load_model(checkpoint("qwen2"), dtype="float32")
    plan = UpdatePlan([LowRankRule(match="layers.*.attention.{q,v}", rank=4)]).resolve(model)
    trainable = random_trainable(jax.eval_shape(plan.init, jax.random.key(0), split(model)[1]))
    save_adapter(tmp_path, plan, trainable, {}, model, "base")

    def configure(**changes):
        values = json.loads((tmp_path / "adapter_config.json").read_text()) | changes
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))

    def change(function):
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        function(tensors)
        save_file(tensors, tmp_path / "adapter_model.safetensors")

    return tmp_path, model, configure, change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOKR"}, "peft_type is 'LOKR'; only .*'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING', which is not supported: .* low_rank on layers"),
        ({"peft_type": "P_TUNING"}, "'P_TUNING', which is not supported: .* trainable_tokens on"),
        ({"use_dora": True}, "lora_magnitude_vector of model.layers.0.self_attn.q_proj is missing"),
        ({"bias": "lora_only"}, "bias is 'lora_only', but no bias has a tensor"),
        ({"bias": "some"}, 'bias "some"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: the model has no lm_head"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens is in modules_to_save but has no tensors"),
        ({"task_type": "SEQ_CLS"}, 'task_type "SEQ_CLS"'),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base's weights"),
        ({"lora_bias": True}, "lora_bias true: not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"some_new_field": 3}, "some_new_field 3: not supported"),
        ({"r": 0}, "r 0: "),
        ({"rank_pattern": {"q_proj": "four"}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj(": 2}}, "no regular expression"),
        ({"target_modules": None}, "target_modules null: Field required"),
        ({"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj has tensors but is not in target_modules"),
        ({"target_modules": "all-linear"}, "layers.2.mlp.down_proj is in target_modules but has no tensors"),
        ({"layers_to_transform": [0, 1]}, "layers.2.self_attn.q_proj has tensors but"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, "layers.0.self_attn.q_proj has tensors but"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "layers.1.self_attn.q_proj has tensors but"),
        (
            {"rank_pattern": {"v_proj": 2}},
            r"lora_A.weight of model.layers.0\S+v_proj has shape \(4, 32\), not \(2, 32\)",
        ),
    ],
)
def test_a_configuration_that_is_not_supported_or_does_not_fit(adapter, changes, message):
    directory, model, configure, _ = adapter
    configure(**changes)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(directory, model)
    assert str(directory) in str(error.value)


def test_all_mismatches_of_tensors_are_listed(adapter):
    directory, model, _, change = adapter
    prefix = "base_model.model.model.layers"

    def spoil(tensors):
        del tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"]
        tensors[f"{prefix}.1.self_attn.v_proj.lora_B.weight"] = np.zeros((16, 5), np.float32)
        tensors[f"{prefix}.7.self_attn.v_proj.lora_B.weight"] = np.zeros((16, 4), np.float32)
        tensors[f"{prefix}.1.self_attn.q_proj.lora_magnitude_vector"] = np.zeros(32, np.float32)
        tensors[f"{prefix}.2.self_attn.q_proj.lora_B.weight"] = np.zeros((32, 4), np.int8)

    change(spoil)
    with pytest.raises(UserError) as error:
        load_adapter(directory, model)
    for part in (
        "lora_A.weight of model.layers.0.self_attn.q_proj is missing",
        "lora_B.weight of model.layers.1.self_attn.v_proj has shape (16, 5), not (16, 4)",
        f"{prefix}.7.self_attn.v_proj.lora_B.weight belongs to no linear layer",
        "lora_magnitude_vector of model.layers.1.self_attn.q_proj belongs to no LORA",
        "has the dtype I8",
    ):
        assert part in str(error.value)


def test_directories_that_are_no_adapters(adapter):
    directory, model, _, _ = adapter
    tensors, configuration = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is truncated"):
        load_adapter(directory, model)
    tensors.unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing"):
        load_adapter(directory, model)
    (directory / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"adapter_model.bin: a pickle"):
        load_adapter(directory, model)
    tensors.write_bytes(whole)
    configuration.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json: not JSON"):
        load_adapter(directory, model)
    configuration.unlink()
    with pytest.raises(UserError, match=r"no adapter_config.json there"):
        load_adapter(directory, model)
    with pytest.raises(UserError, match="no such adapter directory"):
        load_adapter(directory / "none", model)
