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
    "attention_dropout": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1,),
}
"""Fields of which these values are supported; null always is, like a field that is left out."""

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
HARMLESS = frozenset(_ABOUT_THE_FILE | _ABOUT_OUTPUTS | _ABOUT_TOKENS | _ABOUT_GENERATION)
"""Fields that do not change the logits of a causal language model, whatever their value."""
