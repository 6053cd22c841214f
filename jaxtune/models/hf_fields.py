"""Fields of ``config.json`` that every family knows. Those of one family are in :mod:`jaxtune.models.families`."""

from __future__ import annotations

from typing import Any

from jaxtune.models.config import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
"""Names of activations; the first of several with one meaning is written."""

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported rope types, and what each needs beside the base."""

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")

LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
"""Entries of ``layer_types``: whether such a layer has the sliding window."""

ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    # What every decoder here does, so that switched off it would be another model.
    "do_layer_norm_before": (True,),
    "gated_mlp": (True,),
    "is_causal": (True,),
    "rms_norm": (True,),
    "scale_attn_weights": (True,),
    "use_causal_mask": (True,),
    "use_gated_mlp": (True,),
    "use_rms_norm": (True,),
    "use_rmsnorm": (True,),
    "use_rope": (True,),
    "use_rotary": (True,),
    # Factors and counts of what none of them does, at the value that leaves it out.
    "embedding_multiplier": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "residual_multiplier": (1,),
    "rotary_pct": (1,),
}
"""Fields of which these values are supported; null always is, like a field that is left out."""

WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
"""Fields about sliding windows; a family that does not read one accepts it where it says what holds anyway."""


def supported_values(key: str) -> tuple[Any, ...] | None:
    """The values of a field that are supported, by :data:`ONLY` and by its name; None where neither says any."""
    return (0,) if "drop" in key else ONLY.get(key)


def is_off(key: str, value: Any) -> bool:
    """Whether a field is a switch that is off, and so says what holds for a family that does not have it."""
    return value is False and key not in ONLY and not key.startswith(("no_", "disable_"))


_ABOUT_THE_FILE = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "dtype",
    "finetuning_task",
    "model_type",
    "name_or_path",
    "task_specific_params",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
}
_ABOUT_OUTPUTS = {
    "chunk_size_feed_forward",
    "id2label",
    "is_decoder",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "tie_encoder_decoder",
    "use_return_dict",
}
_ABOUT_TOKENS = {
    "cls_token_id",
    "decoder_start_token_id",
    "mask_token_id",
    "prefix",
    "sep_token_id",
    "tokenizer_class",
    "unk_token_id",
}
_ABOUT_GENERATION = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
}
_FOR_OTHER_PROGRAMS = {
    "_flash_attn_2_enabled",
    "gradient_checkpointing",
    "is_llama_config",
    "max_sequence_length",
    "neuron",
    "ort_config",
    "pretraining_tp",
    "transformers.js_config",
    "use_flash_attn",
}
HARMLESS = frozenset(_FOR_OTHER_PROGRAMS | _ABOUT_THE_FILE | _ABOUT_OUTPUTS | _ABOUT_TOKENS | _ABOUT_GENERATION)
"""Fields that do not change the logits of a causal language model, whatever their value."""
