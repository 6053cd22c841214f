"""``config.json``: published files and those of transformers 5 against its own reading, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.errors import UserError
from jaxtune.models.config import DecoderConfig, RopeConfig
from jaxtune.models.families import FAMILIES
from jaxtune.models.hf_config import checkpoint_config, decoder_config, read_config

LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

# The fields of files as they are published, shortened only by fields that every one of them has.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "llama-3.1-8b-instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_SCALING,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "qwen2-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 131072,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}
# Multimodal: what is left out of text_config has to be known.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def transformers_form(values: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    from transformers import AutoConfig

    kind = values["model_type"]
    rest = {key: value for key, value in values.items() if key != "model_type"}
    return json.loads(AutoConfig.for_model(kind, **json.loads(json.dumps(rest))).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_form_is_what_transformers_reads(name: str) -> None:
    published = PUBLISHED[name]
    config = decoder_config(published)
    assert decoder_config(transformers_form(published)) == config
    written = checkpoint_config(config, "bfloat16")
    assert decoder_config(written) == config
    # transformers sees the same model in what we write; its file-keeping fields aside.
    theirs, ours = transformers_form(published), transformers_form(written)
    keeping = {"dtype", "_name_or_path", "transformers_version", "architectures", "cache_implementation", "head_dim"}
    keeping |= {"sliding_window", "max_window_layers"} if config.window is None else set()
    keeping |= {"pretraining_tp", "hidden_act", "sliding_window_pattern"}
    assert {key: ours.get(key) for key in theirs if key not in keeping} == {
        key: value for key, value in theirs.items() if key not in keeping
    }


def test_values_of_published_files() -> None:
    llama = decoder_config(PUBLISHED["llama-3.1-8b-instruct"])
    assert llama.rope == RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert llama.eos_token_ids == (128001, 128008, 128009)
    assert llama.head_dim == 128
    assert decoder_config(PUBLISHED["mistral-7b"]).windows == (4096,) * 32
    qwen = decoder_config(PUBLISHED["qwen2-0.5b"])
    assert (qwen.qkv_bias, qwen.output_bias, qwen.window, qwen.tie_embeddings) == (True, False, None, True)
    assert decoder_config(PUBLISHED["qwen3-0.6b"]).qk_norm
    gemma2 = decoder_config(PUBLISHED["gemma-2-2b"])
    assert gemma2.windows == (4096, None) * 13
    assert (gemma2.attention_soft_cap, gemma2.final_soft_cap, gemma2.embedding_scale) == (50.0, 30.0, 48.0)
    gemma3 = decoder_config(PUBLISHED["gemma-3-1b-it"])
    assert gemma3.windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert (gemma3.rope.theta, gemma3.local_rope) == (1e6, RopeConfig(1e4))


def test_a_null_theta_beside_the_objects_of_the_layers() -> None:
    """So transformers 5.0 to 5.12 write Gemma 3."""
    published = PUBLISHED["gemma-3-1b-it"]
    told = {name: value for name, value in published.items() if name not in ("rope_scaling", "rope_local_base_freq")}
    layers = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert decoder_config({**told, "rope_theta": None, "rope_parameters": layers}) == decoder_config(published)


def test_multimodal_text_part() -> None:
    config = decoder_config(GEMMA_3_4B)
    text = transformers_form(GEMMA_3_4B)["text_config"]
    assert dataclasses.replace(config, eos_token_ids=(1,)) == decoder_config(text)
    assert config.eos_token_ids == (1, 106)
    assert config.family == "gemma3_text"
    assert config.rope == RopeConfig(1e6, "linear", 8.0)
    assert (config.num_heads, config.head_dim, config.vocab_size, config.tie_embeddings) == (8, 256, 262_208, True)


def test_the_whole_ties_the_head_of_a_model_of_several_parts() -> None:
    text = {**GEMMA_3_4B["text_config"], "tie_word_embeddings": True}
    assert decoder_config({**GEMMA_3_4B, "text_config": text}).tie_embeddings
    assert not decoder_config({**GEMMA_3_4B, "tie_word_embeddings": False, "text_config": text}).tie_embeddings
    with pytest.raises(UserError, match=r"c\.json: text_config must be an object"):
        decoder_config({**GEMMA_3_4B, "text_config": "gemma"}, source="c.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """A field that a file leaves out means what transformers makes of it."""
    assert decoder_config({"model_type": family}) == decoder_config(transformers_form({"model_type": family}))
    assert decoder_config({"model_type": family, **TINY}) == decoder_config(
        transformers_form({"model_type": family, **TINY})
    )


def test_generation_config_names_the_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_config(tmp_path).eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id = \"x\""):
        read_config(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    ("llama", {"rope_parameters": YARN}, "rope type 'yarn' is not supported"),
    ("qwen2", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope type 'longrope'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor is missing"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "8"}}, "factor must be a number"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: supported is 1"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention is not supported"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "full_attention and sliding_attention"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"factor": 2.0}}, "contradicts rope_parameters"),
    ("llama", {"hidden_act": "relu2"}, 'hidden_act = "relu2": not supported; did you mean'),
    ("gemma2", {"hidden_act": "gelu"}, 'contradicts hidden_activation = "gelu_pytorch_tanh"'),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, 'quantization_config = {"quant_method": "gptq"}'),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "made of, and set model.quantize to hold"),
    ("mistral", {"num_local_experts": 8}, "num_local_experts = 8"),
    ("mistral", {"attention_bias": True}, "attention_bias = true: supported is false"),
    ("llama", {"logit_scale": 0.0625}, "logit_scale = 0.0625"),
    ("llama", {"sliding_window": 4096}, "sliding_window = 4096"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1: supported is 0"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: supported is null"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ("gemma2", {"layer_types": ["full_attention"]}, "for each of the 2 layers"),
    ("gemma2", {"sliding_window": None}, "its size is needed"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "its size is needed"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "brings code of its own, which is never run"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "supported is LlamaForCausalLM"),
    ("llama", {"hidden_sizes": 64}, "hidden_sizes = 64: not a field of this family that is supported; did you mean"),
    ("llama", {"num_hidden_layers": "2"}, 'num_hidden_layers = "2": must be a whole number'),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps = null: must be a number"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
    ("llama", {"eos_token_id": "</s>"}, "must be a token id or a list of them"),
    ("llama", {"eos_token_id": -1}, "must be a token id or a list of them"),
    ("llama", {"rms_norm_eps": math.nan}, "must be a number"),
    ("llama", {"model_type": ["llama"]}, "is not supported; did you mean 'llama'?"),
    ("llama", {"num_attention_heads": 3}, "3 attention heads do not divide it"),
    ("llama", {"num_key_value_heads": 3}, "must divide num_heads"),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_what_would_compute_another_model_is_refused(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        decoder_config({"model_type": family, **TINY, **fields}, source="some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_offences_are_in_one_message() -> None:
    with pytest.raises(UserError) as error:
        decoder_config({"model_type": "llama", **TINY, "logit_scale": 2.0, "hidden_act": "relu", "rope_scaling": YARN})
    assert all(part in str(error.value) for part in ("logit_scale = 2.0", 'hidden_act = "relu"', "'yarn'"))


def test_null_and_harmless_fields_are_accepted() -> None:
    extra = {"logit_scale": None, "use_cache": False, "temperature": 0.3, "unk_token_id": 0, "auto_map": {}}
    assert decoder_config({"model_type": "llama", **TINY, **extra}) == decoder_config({"model_type": "llama", **TINY})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "lama"}', "model_type 'lama' is not supported; did you mean 'llama'?"),
        ('{"vocab_size": 4}', "model_type None"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        (None, "there is no config.json"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_what_a_family_cannot_say_is_not_written() -> None:
    config = decoder_config({"model_type": "llama", **TINY})
    with pytest.raises(UserError, match=r"a llama config\.json cannot express output_bias = False"):
        checkpoint_config(dataclasses.replace(config, qkv_bias=True, output_bias=False))
    with pytest.raises(UserError, match=r"windows = \(4, None\)"):
        checkpoint_config(dataclasses.replace(decoder_config({"model_type": "mistral", **TINY}), windows=(4, None)))
    with pytest.raises(UserError, match=r"family 'lama' has no checkpoint format; did you mean 'llama'\?"):
        checkpoint_config(dataclasses.replace(config, family="lama"))


@settings(max_examples=40, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_what_is_written_is_read_back(family: str, data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 8))
    windowed = FAMILIES[family].windows
    size = data.draw(st.integers(1, 99))
    per_layer = {
        "none": st.just((None,) * layers),
        "all": st.sampled_from([(None,) * layers, (size,) * layers]),
    }.get(windowed, st.lists(st.sampled_from([None, size]), min_size=layers, max_size=layers).map(tuple))
    rope = st.builds(RopeConfig, theta=st.floats(10, 1e7)) | st.builds(
        RopeConfig, theta=st.floats(10, 1e7), kind=st.just("linear"), factor=st.floats(1, 32)
    )
    base = decoder_config({"model_type": family, **TINY})
    biased = base.qkv_bias if family in ("mistral", "qwen2") else data.draw(st.booleans())
    config = DecoderConfig(
        **{
            **{field.name: getattr(base, field.name) for field in dataclasses.fields(base)},
            "num_layers": layers,
            "windows": data.draw(per_layer),
            "head_dim": 2 * data.draw(st.integers(1, 40)),
            "tie_embeddings": data.draw(st.booleans()),
            "qkv_bias": biased,
            "output_bias": biased and family != "qwen2",
            "rope": data.draw(rope),
            "local_rope": data.draw(rope) if base.local_rope is not None else None,
            "activation": data.draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
            "eos_token_ids": data.draw(st.lists(st.integers(0, 39), max_size=3).map(tuple)),
            "pad_token_id": data.draw(st.none() | st.integers(0, 39)),
        }
    )
    assert decoder_config(json.loads(json.dumps(checkpoint_config(config)))) == config
