"""PEFT's way to each update method, for the comparison of steps: what it makes of a model, and with which optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.config.rule import RuleConfig

Adapted = tuple[Any, Any]
"""The trained model, and its optimizer; None in place of it for AdamW over all that is trained."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE = 1e-4


def _lora(**options: Any) -> Callable[[Any, Any], Adapted]:
    def adapted(model: Any, rule: Any) -> Adapted:
        from peft import LoraConfig, get_peft_model

        given = {"r": rule.rank, "lora_alpha": rule.alpha, "target_modules": list(TARGETS), **options}
        return get_peft_model(model, LoraConfig(**given)), None

    return adapted


def _lora_plus(model: Any, rule: Any) -> Adapted:
    import torch
    from peft.optimizers import create_loraplus_optimizer

    adapted, _ = _lora()(model, rule)
    return adapted, create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=rule.ratio)


def _lora_fa(model: Any, rule: Any) -> Adapted:
    from peft.optimizers import create_lorafa_optimizer

    adapted, _ = _lora()(model, rule)
    return adapted, create_lorafa_optimizer(adapted, r=rule.rank, lora_alpha=int(rule.alpha), lr=RATE)


def _trainable_tokens(model: Any, rule: Any) -> Adapted:
    return _lora(trainable_token_indices=[0, 1])(model, rule)


def _full(model: Any, rule: Any) -> Adapted:
    del rule
    return model, None


def _bitfit(model: Any, rule: Any) -> Adapted:
    del rule
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    return model, None


def _other(kind: str, options: Callable[[Any], dict[str, Any]]) -> Callable[[Any, Any], Adapted]:
    def adapted(model: Any, rule: Any) -> Adapted:
        import peft

        return peft.get_peft_model(model, getattr(peft, kind)(**options(rule))), None

    return adapted


_PEERS: dict[str, Callable[[Any, Any], Adapted]] = {
    "low_rank": _lora(),
    "rslora": _lora(use_rslora=True),
    "lora_plus": _lora_plus,
    "lora_fa": _lora_fa,
    "dora": _lora(use_dora=True),
    "low_rank_embedding": _lora(target_modules=[*TARGETS, "embed_tokens"], rank_pattern={"embed_tokens": 8}),
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "orthogonal": _lora(init_lora_weights="orthogonal"),
    "trainable_tokens": _trainable_tokens,
    "full": _full,
    "bitfit": _bitfit,
    "norms": _other("LNTuningConfig", lambda rule: {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "miss": _other("MissConfig", lambda rule: {"r": rule.rank, "target_modules": list(TARGETS)}),
    "vera": _other("VeraConfig", lambda rule: {"r": rule.rank, "target_modules": list(TARGETS)}),
    "ia3": _other(
        "IA3Config",
        lambda rule: {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "oft": _other(
        "OFTConfig",
        lambda rule: {"r": 0, "oft_block_size": rule.block_size, "target_modules": list(TARGETS)},
    ),
}


def peer(method: str) -> Callable[[Any, RuleConfig], Adapted] | None:
    """What makes PEFT's model of a method from a transformers one and a rule; None where PEFT has no such method.

    (Full training and biases are torch's own, for the same comparison.)
    """
    return _PEERS.get(method)
