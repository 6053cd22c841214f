"""What tells one family of checkpoints from another: defaults of ``config.json``, and the names of the weights.

Tables only. A new family that the :class:`~jaxtune.models.decoder.Decoder` can compute is one more entry of
:data:`FAMILIES`; how the tables are read is in :mod:`jaxtune.models.hf_config` (fields) and
:mod:`jaxtune.models.checkpoint` (weights).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

from jaxtune.errors import UserError, nearest
from jaxtune.models.architectures import ARCHITECTURES, Architecture, Layout, architectures_of
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import declare, linear_modules


@dataclasses.dataclass(frozen=True)
class WeightName:
    """How one of our arrays is called in a checkpoint.

    Attributes:
        template: The name; ``{layer}`` stands for the layer's number.
        transpose: The file holds (out, in), we hold (in, out).
    """

    template: str
    transpose: bool

    @property
    def stacked(self) -> bool:
        """One tensor for each layer, which we keep in one array."""
        return "{layer}" in self.template

    def of(self, layer: int) -> str:
        """The name in one layer; of an array that is not in the layers, its only name."""
        return self.template.replace("{layer}", str(layer))


_MODULES = {
    "lm_head": "lm_head",
    "layers.attention.q": "model.layers.{layer}.self_attn.q_proj",
    "layers.attention.k": "model.layers.{layer}.self_attn.k_proj",
    "layers.attention.v": "model.layers.{layer}.self_attn.v_proj",
    "layers.attention.o": "model.layers.{layer}.self_attn.o_proj",
    "layers.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
    "layers.mlp.up": "model.layers.{layer}.mlp.up_proj",
    "layers.mlp.down": "model.layers.{layer}.mlp.down_proj",
    "layers.attention.q_norm": "model.layers.{layer}.self_attn.q_norm",
    "layers.attention.k_norm": "model.layers.{layer}.self_attn.k_norm",
    "layers.attention_norm": "model.layers.{layer}.input_layernorm",
    "final_norm": "model.norm",
    "embed": "model.embed_tokens",
}
_PRE_NORM = {"layers.mlp_norm": "model.layers.{layer}.post_attention_layernorm"}
_PRE_AND_POST_NORM = {
    "layers.attention_post_norm": "model.layers.{layer}.post_attention_layernorm",
    "layers.mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "layers.mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
}
_LEAVES = {
    "kernel": WeightName("weight", transpose=True),
    "bias": WeightName("bias", transpose=False),
    "scale": WeightName("weight", transpose=False),
    "table": WeightName("weight", transpose=False),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """The text-only models of one ``model_type`` of ``config.json``.

    Attributes:
        name: The ``model_type``.
        defaults: What transformers assumes of a field that ``config.json`` leaves out; also the list of the fields that
            are read, beside those of :mod:`~jaxtune.models.hf_fields`. A ``head_dim`` of None is hidden size over
            heads, a ``num_key_value_heads`` of None is the number of heads.
        activation_key: The field that names the activation.
        only: Fields of which only these values are supported, because transformers or the decoder computes no other;
            null always is supported.
        harmless: Fields that published files carry and transformers does not read, beside those harmless anywhere.
        windows: Which layers have the sliding window: none, all, those from ``max_window_layers`` on, every layer but
            each n-th; an explicit ``layer_types`` wins, where the family has it.
        qkv_bias: q, k and v always have a bias (True), never (False), or as ``attention_bias`` says (None).
        gemma: Norms of ``1 + scale`` before and after each block, scaled embeddings, ``query_pre_attn_scalar``.
        qk_norm: Query and key heads are normed.
        local_rope: Layers with a window have a rotary base of their own.
        ignored: Patterns of weights that no text model has, or that are computed.
    """

    name: str
    defaults: Mapping[str, Any]
    activation_key: str = "hidden_act"
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    windows: Literal["none", "all", "from", "pattern"] = "none"
    qkv_bias: bool | None = None
    gemma: bool = False
    qk_norm: bool = False
    local_rope: bool = False
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)

    def modules(self) -> dict[str, str]:
        """Our module paths to the checkpoint's; ``{layer}`` stands for the layer's number."""
        return _MODULES | (_PRE_AND_POST_NORM if self.gemma else _PRE_NORM)

    def canonical(self, name: str) -> str | None:
        """A tensor's name as a text-only checkpoint would spell it, or None if a text model does not need it."""
        if any(re.search(pattern, name) for pattern in self.ignored):
            return None
        for architecture in architectures_of(self.name):
            for layout in architecture.layouts:
                # A text-only model's names begin as some of the others do, so they come last, as they are.
                if layout != Layout() and (found := layout.canonical(name)) is not None:
                    return found
        return name


_COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            _COMMON
            | {
                "vocab_size": 32_000,
                "hidden_size": 4096,
                "intermediate_size": 11_008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "hidden_act": "silu",
                "max_position_embeddings": 2048,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "mlp_bias": False,
            },
        ),
        Family(
            "mistral",
            _COMMON
            | {
                "vocab_size": 32_000,
                "hidden_size": 4096,
                "intermediate_size": 14_336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "hidden_act": "silu",
                "max_position_embeddings": 131_072,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "sliding_window": 4096,
            },
            only={"attention_bias": (False,)},
            windows="all",
            qkv_bias=False,
        ),
        Family(
            "qwen2",
            _COMMON | _QWEN,
            windows="from",
            qkv_bias=True,
        ),
        Family("qwen3", _COMMON | _QWEN | {"head_dim": 128}, windows="from", qk_norm=True),
        Family(
            "gemma2",
            _COMMON
            | _GEMMA
            | {
                "vocab_size": 256_000,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            activation_key="hidden_activation",
            only={"use_bidirectional_attention": (False,)},
            harmless=("sliding_window_size",),
            windows="pattern",
            gemma=True,
        ),
        Family(
            "gemma3_text",
            _COMMON
            | _GEMMA
            | {
                "vocab_size": 262_208,
                "max_position_embeddings": 131_072,
                "final_logit_softcapping": None,
            },
            activation_key="hidden_activation",
            # transformers' Gemma 3 has a field for the attention's soft cap and does not apply it.
            only={"use_bidirectional_attention": (False,), "attn_logit_softcapping": ()},
            windows="pattern",
            gemma=True,
            qk_norm=True,
            local_rope=True,
            ignored=(r"\.rotary_emb\w*\.inv_freq$", r"^(model\.)?(vision_tower|multi_modal_projector)\."),
        ),
    )
}
"""Every family that can be loaded, by the ``model_type`` of its text-only model."""


def family_of(config: DecoderConfig) -> Family:
    """The table entry of a configuration.

    Raises:
        UserError: ``config.family`` has no checkpoint format.
    """
    if config.family not in FAMILIES:
        raise UserError(f"family {config.family!r} has no checkpoint format{nearest(config.family, FAMILIES)}")
    return FAMILIES[config.family]


def architecture_of(config: DecoderConfig) -> Architecture:
    """What transformers loads for the ``config.json`` that a configuration was read from.

    Raises:
        UserError: As :func:`family_of`.
    """
    return ARCHITECTURES[config.model_type or family_of(config).name]


def weight_names(config: DecoderConfig) -> dict[str, WeightName]:
    """How each array of :func:`~jaxtune.models.declarations.declare` is called in a checkpoint."""
    modules = family_of(config).modules()
    names = {}
    for path in declare(config):
        module, _, leaf = path.rpartition(".")
        names[path] = WeightName(f"{modules[module]}.{_LEAVES[leaf].template}", _LEAVES[leaf].transpose)
    return names


def checkpoint_module(config: DecoderConfig, path: str) -> str:
    """The checkpoint's name of one layer's module: ``layers.3.attention.q`` is ``model.layers.3.self_attn.q_proj``.

    Raises:
        UserError: The decoder has no such linear module.
    """
    names = _module_names(config)
    if path not in names:
        raise UserError(f"the model has no linear module {path!r}{nearest(path, names)}")
    return names[path]


def our_pattern(text: str) -> str:
    """A path pattern with the names of checkpoints turned into ours: ``q_proj`` is ``layers.*.attention.q``.

    Args:
      text: a pattern, or what other tools call target modules.
    """
    if text in ("all-linear", "all"):
        return "layers.*.{attention,mlp}.*"
    theirs = {template.rpartition(".")[2]: path for path, template in _MODULES.items()}
    if text in theirs and text not in _MODULES:
        return theirs[text].replace("layers.", "layers.*.", 1)
    names = {"self_attn": "attention", **{name: path.rpartition(".")[2] for name, path in theirs.items()}}
    ours = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text.removeprefix("model."))
    if re.match(r"(attention|mlp)\b", ours):
        return f"layers.*.{ours}"
    if ours != text and "," in ours and re.fullmatch(r"[\w,]+", ours):
        ours = f"{{{ours}}}"
    # One part before the module's own name, where ours has two or three: layers.*.q_proj, *.q_proj.
    if short := re.fullmatch(r"(layers\.[^.]+|layers\.\{\d+\.\.\d+\}|\*)\.(\w+|\{[\w,]+\})", ours):
        words = re.findall(r"\w+", text.removeprefix("model.")[short.start(2) :])
        found = [theirs[word].split(".") for word in words if word in theirs]
        parents = {parts[-2] for parts in found if len(parts) > 2}
        if parents:
            middle = parents.pop() if len(parents) == 1 else "*"
            return f"**.{short[2]}" if short[1] == "*" else f"{short[1]}.{middle}.{short[2]}"
    # Names alone, in braces.
    return f"**.{ours}" if ours != text and ours.startswith("{") else ours


@functools.cache
def _module_names(config: DecoderConfig) -> dict[str, str]:
    modules = family_of(config).modules()
    names = {}
    for path in linear_modules(config):
        if not path.startswith("layers."):
            names[path] = modules[path]
            continue
        for layer in range(config.num_layers):
            one = path.replace("layers.", f"layers.{layer}.", 1)
            names[one] = modules[path].replace("{layer}", str(layer))
    return names
