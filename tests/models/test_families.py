"""The weight-name tables against the names that transformers' models have."""

from __future__ import annotations

from typing import Any

import pytest

from jaxtune.errors import UserError
from jaxtune.models.architectures import ARCHITECTURES
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import declare, linear_modules
from jaxtune.models.families import FAMILIES, architecture_of, checkpoint_module, weight_names
from jaxtune.models.hf_config import decoder_config
from jaxtune.updates.peft.format import all_modules

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
}


def config_of(family: str) -> DecoderConfig:
    biases = {"attention_bias": True} if FAMILIES[family].qkv_bias is None else {}
    return decoder_config({"model_type": family, **SIZES, **biases})


def transformers_model(family: str) -> Any:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    biases = {"attention_bias": True} if FAMILIES[family].qkv_bias is None else {}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **biases))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family: str) -> None:
    config = config_of(family)
    expected = {name: tuple(value.shape) for name, value in transformers_model(family).state_dict().items()}
    specs, found = declare(config), {}
    for path, name in weight_names(config).items():
        shape = specs[path].shape[1:] if name.stacked else specs[path].shape
        for layer in range(config.num_layers if name.stacked else 1):
            found[name.of(layer)] = shape[::-1] if name.transpose else shape
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_the_linear_layers_of_transformers(family: str) -> None:
    torch = pytest.importorskip("torch")

    config = config_of(family)
    theirs = {
        name for name, module in transformers_model(family).named_modules() if isinstance(module, torch.nn.Linear)
    }
    ours = []
    for path in linear_modules(config):
        layers = range(config.num_layers) if path.startswith("layers.") else [None]
        for layer in layers:
            one = path if layer is None else path.replace("layers.", f"layers.{layer}.", 1)
            ours.append(checkpoint_module(config, one))
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_class_and_its_names_are_those_that_transformers_loads(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = ARCHITECTURES[kind]
    sizes = {**SIZES, "num_hidden_layers": 2}
    fields = {**sizes} if architecture.part is None else {architecture.part: sizes, "tie_word_embeddings": False}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    assert type(model).__name__ == architecture.name
    language = {*model.get_decoder().modules(), model.get_output_embeddings()}
    theirs = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (module in language or architecture.part is None)
    }
    config = decoder_config({"model_type": kind, **fields})
    assert architecture_of(config) is architecture
    assert all_modules(config, architecture.layout).keys() == theirs
    for layout in architecture.layouts:
        for name in all_modules(config, layout):
            assert layout.spell(layout.canonical(name) or "") == name
            assert FAMILIES[architecture.family].canonical(f"{name}.weight") == f"{layout.canonical(name)}.weight"


def test_module_names_that_do_not_exist() -> None:
    config = config_of("llama")
    for path in ("layers.12.attention.q", "layers.attention.q", "layers.1.attention.w", "layers.1.lm_head", "embed"):
        with pytest.raises(UserError, match="no linear module"):
            checkpoint_module(config, path)


def test_multimodal_names() -> None:
    gemma = FAMILIES["gemma3_text"]
    assert gemma.canonical("language_model.model.norm.weight") == "model.norm.weight"
    assert gemma.canonical("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert gemma.canonical("language_model.lm_head.weight") == "lm_head.weight"
    assert gemma.canonical("model.norm.weight") == "model.norm.weight"
    assert gemma.canonical("vision_tower.vision_model.head.probe") is None
    assert gemma.canonical("model.multi_modal_projector.mm_soft_emb_norm.weight") is None
    assert FAMILIES["llama"].canonical("vision_tower.x") == "vision_tower.x"
