"""Fields of ``config.json`` that say nothing: switches that are off, and notes for other programs."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from jaxtune.errors import UserError
from jaxtune.models.config import RopeConfig
from jaxtune.models.families import FAMILIES
from jaxtune.models.hf_config import decoder_config

# As published.
DISTILLED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SWITCHED_OFF: list[dict[str, Any]] = [
    {"use_mrope": False},
    {"rope_interleaved": False},
    {"use_sliding_window": False},
    {"resid_pdrop": 0.0, "embd_pdrop": 0, "hidden_dropout": 0.0},
    {"mlp_bias": False, "qk_layernorm": False, "use_bidirectional_attention": False},
    {"logit_scale": 1.0, "num_experts": 0, "is_causal": True},
    {"is_llama_config": True, "ort_config": {"kv": 1}, "transformers.js_config": {"dtype": "q4"}, "pretraining_tp": 2},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_switches_that_are_off_and_notes_for_other_programs_are_accepted(family: str) -> None:
    values = {"model_type": family, **TINY}
    plain = decoder_config(values)
    for fields in SWITCHED_OFF:
        assert decoder_config({**values, **fields}) == plain
        if not FAMILIES[family].local_rope:
            rope = {"type": "linear", "factor": 2.0}
            scaled = decoder_config({**values, "rope_scaling": {**rope, "mrope_interleaved": False}})
            assert scaled == decoder_config({**values, "rope_scaling": rope})
    # A window that is switched off, with the size that it would have; and what says what the layers do anyway.
    if FAMILIES[family].windows in ("none", "from"):
        unused = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}
        assert decoder_config({**values, **unused}) == plain
    types = ["full_attention" if window is None else "sliding_attention" for window in plain.windows]
    assert decoder_config({**values, "layer_types": types}) == plain


def test_published_files_with_switches_and_notes() -> None:
    from transformers import AutoConfig

    config = decoder_config(DISTILLED)
    assert (config.window, config.rope, config.tie_embeddings) == (None, RopeConfig(1e4), False)
    assert config == decoder_config({key: value for key, value in DISTILLED.items() if key != "use_mrope"})
    notes = ("is_llama_config", "rope_interleaved", "transformers.js_config")
    assert decoder_config(SMOLLM2) == decoder_config({key: SMOLLM2[key] for key in SMOLLM2 if key not in notes})
    for values in (DISTILLED, SMOLLM2):
        # The same in the form that transformers writes after reading it.
        rest = {key: value for key, value in values.items() if key != "model_type"}
        theirs = AutoConfig.for_model(values["model_type"], **copy.deepcopy(rest))
        assert decoder_config(json.loads(theirs.to_json_string(use_diff=False))) == decoder_config(values)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"use_sliding_window": True}, "use_sliding_window = true: not a field of this family"),
        ("llama", {"use_sliding_window": 0}, "use_sliding_window = 0: not a field of this family"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "none has a sliding window"),
        ("mistral", {"use_sliding_window": False, "sliding_window": 64}, "use_sliding_window = false: not a field"),
        ("mistral", {"sliding_window": None, "use_sliding_window": True}, "none has a sliding window"),
        ("gemma2", {"max_window_layers": 2}, "max_window_layers = 2"),
        ("qwen2", {"use_mrope": True}, "use_mrope = true: not a field of this family"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = true"),
        ("qwen3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1: supported is 0"),
        ("mistral", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob = 0.1: supported is 0"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias = true: not a field of this family"),
        ("qwen2", {"is_causal": False}, "is_causal = false: supported is true"),
        ("llama", {"no_bias": False}, "no_bias = false: not a field of this family"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_interleaved": True}},
            "mrope_interleaved is not",
        ),
    ],
)
def test_what_is_on_and_not_supported_is_refused(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        decoder_config({"model_type": family, **TINY, **fields}, source="some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert message in str(error.value)
