"""Tiny models for the tests of updates: a table of arrays, and one transformers model of each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.config import DecoderConfig

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3_text": ("Gemma3", _GEMMA),
    "gemma3": ("Gemma3 with images", {**_GEMMA, "tie_word_embeddings": False}),
}
_IMAGES: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 60,
    "boi_token_index": 58,
    "eoi_token_index": 59,
}


@pytest.fixture(scope="session")
def config() -> DecoderConfig:
    """A decoder with biases on q, k and v and a head of its own."""
    return DecoderConfig(
        "qwen2", 61, 32, 40, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory that transformers saved a random model of a family to."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            torch = pytest.importorskip("torch")
            import transformers

            torch.set_num_threads(1)
            torch.manual_seed(0)
            family, fields = FAMILIES[name]
            if name == "gemma3":
                settings = transformers.Gemma3Config(
                    text_config={**_SIZES, **fields}, tie_word_embeddings=fields["tie_word_embeddings"], **_IMAGES
                )
                model = transformers.Gemma3ForConditionalGeneration(settings)
            else:
                kind = "Gemma3Text" if family == "Gemma3" else family
                settings = getattr(transformers, f"{kind}Config")(**{**_SIZES, **fields})
                model = getattr(transformers, f"{family}ForCausalLM")(settings)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim == 2:  # larger than the usual start, so that logits are of the order of one
                        weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return give


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Two rows of tokens that every family has."""
    return np.random.default_rng(0).integers(3, 61, (2, 12)).astype(np.int32)


def randomized(trainable: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Every array random, B too."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * generator.standard_normal(leaf.shape), jnp.float32), trainable)


@pytest.fixture(scope="session")
def random_trainable() -> Callable[..., Any]:
    """See :func:`randomized`."""
    return randomized


@pytest.fixture(scope="session")
def torch_logits() -> Callable[[Any, np.ndarray], np.ndarray]:
    """Logits of a torch model."""

    def give(model: Any, tokens: np.ndarray) -> np.ndarray:
        torch = pytest.importorskip("torch")

        with torch.no_grad():
            return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()

    return give
