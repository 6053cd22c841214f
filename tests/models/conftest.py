"""Reference models of transformers: every family with every feature switched on, tiny, and nothing at its default."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

_SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": None,
    "attention_dropout": 0.0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that wavelengths of all three regimes occur
}
_GEMMA = {"query_pre_attn_scalar": 20, "attention_bias": True, "sliding_window": 8, "final_logit_softcapping": 3.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama2_tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama3.1": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "head_dim": 16}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mistral_tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "head_dim": 8}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen3": (
        "Qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2_untied": ("Gemma2", {**_GEMMA, "tie_word_embeddings": False, "hidden_activation": "gelu"}),
    "gemma3": (
        "Gemma3",
        {
            **_GEMMA,
            "num_hidden_layers": 7,  # 5 local, 1 global, 1 local
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_untied": ("Gemma3", {**_GEMMA, "tie_word_embeddings": False}),
}


def _randomized(model: Any, gemma: bool) -> Any:
    """Random weights everywhere: default norms of one and biases of zero would hide what is wrong with them."""
    torch = pytest.importorskip("torch")

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(0.3 * noise + (0.0 if gemma else 1.0))
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(1.2 * noise / weight.shape[-1] ** 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Makes the transformers model of a name in ``CASES``, with eager attention and random weights."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.set_num_threads(1)

    def make(name: str) -> Any:
        family, fields = CASES[name]
        kind = "Gemma3Text" if family == "Gemma3" else family
        config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **fields})
        config._attn_implementation = "eager"
        return _randomized(getattr(transformers, f"{family}ForCausalLM")(config), family.startswith("Gemma"))

    return make


@pytest.fixture(scope="session")
def checkpoint(
    reference: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Path]]:
    """Gives the reference model of a name in ``CASES`` and the directory that transformers saved it to."""
    made: dict[str, tuple[Any, Path]] = {}

    def give(name: str) -> tuple[Any, Path]:
        if name not in made:
            model = reference(name)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return give


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Each name in ``CASES``."""
    return request.param
