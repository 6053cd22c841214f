"""``search.space: lora``: the usual keys of a low-rank fine-tuning, with priors that others have found sound.

=================== ============================== ======================= ==========================================
key                 range                          prior                   after
=================== ============================== ======================= ==========================================
learning rate       prior / 30 to prior × 10       see :func:`likely_rate` Schulman et al. 2025
warm-up             0 to 0.3                       0.06                    Hu et al. 2021, RoBERTa
weight decay        1e-4 to 0.1, in ratios         0.01                    Hu et al. 2021, GPT-2
rank of a rule      4 to 64, powers of two         16                      this package's default
alpha of a rule     8 to 128, in ratios            32 (rsLoRA: 8)          Hu et al. 2021, GPT-2; Schulman et al. 2025
dropout of a rule   0 to 0.2                       0.05                    Hu et al. 2021: 0 for RoBERTa, 0.1 for GPT-2
=================== ============================== ======================= ==========================================

Confidence is medium for rate and alpha, low for the others, on which less depends. With alpha fixed and the term scaled
by alpha / rank, the best rate hardly depends on the rank, so that none is scaled by it; under rsLoRA's alpha /
sqrt(rank) the alpha of the same scale at rank 16 is 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import Config, with_overrides
from jaxtune.config.update_rules import Rule
from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, read_config
from jaxtune.search.header import first_record
from jaxtune.training.model_directory import model_directory
from jaxtune.updates.treatments.low_rank import RankRule

# Of the full fine-tuning's rate at a width of 2000, and how many times that a low-rank term takes.
_FULL_RATE, _TIMES, _WIDTH = 5e-5, 10.0, 2000
# The power of the width that the rate falls with, by family; for others the middle of the two that are known.
_POWERS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}
_OTHER_POWER = 0.43
# Below this width nothing was fitted.
_NARROWEST, _NARROW_POWER = 1024, 0.781


def with_space(config: Config, run_dir: str | Path | None = None) -> Config:
    """The configuration with the keys that ``search.space: lora`` stands for, which a study then records.

    What ``search.space`` names besides takes their place, or comes on top. A study that has begun keeps the space in
    its journal, whatever a later version would search over.

    Args:
      config: with or without a ``search`` section; rules of an adapter are in it already.
      run_dir: of the study, where that is not the configuration's.

    Raises:
      UserError: no rule is low-rank, or the model cannot be read.
    """
    search = config.search
    if search is None or search.preset is None:
        return config
    own = {key: dimension.model_dump(exclude_none=True) for key, dimension in search.space.items()}
    begun = first_record(config.directory if run_dir is None else run_dir) or {}
    space = begun.get("space") or lora_space(
        config.update, read_config(model_directory(config)), settled=config.model.adapter is not None
    )
    return with_overrides(config, {"search.space": {**space, **own}, "search.preset": None}, origin="search.space: ")


def lora_space(rules: Sequence[Rule], model: DecoderConfig, *, settled: bool = False) -> dict[str, Mapping[str, Any]]:
    """Dotted key to what to try.

    Args:
      rules: ``update``.
      model: whose family and width the rate depends on.
      settled: ranks and alphas are those of the adapter that training starts from.

    Raises:
      UserError: none of the rules is low-rank.
    """
    low_rank = {index: rule for index, rule in enumerate(rules) if isinstance(rule, RankRule)}
    if not low_rank:
        raise UserError(
            f"search.space: lora searches over rank, alpha and dropout of low-rank rules, and update has none "
            f"({', '.join(rule.method for rule in rules)}); add a rule with method: low_rank, or name the keys"
        )
    rate = likely_rate(model)
    space: dict[str, Mapping[str, Any]] = {
        "optimizer.learning_rate": {"log_uniform": [_round(rate / 30, 1), _round(rate * 10, 1)], "prior": rate},
        "optimizer.warmup": {"uniform": [0.0, 0.3], "prior": 0.06, "confidence": "low"},
        "optimizer.weight_decay": {"log_uniform": [1e-4, 0.1], "prior": 0.01, "confidence": "low"},
    }
    for index, rule in low_rank.items():
        if not settled:
            alpha = 8.0 if rule.rooted else 32.0
            space[f"update.{index}.rank"] = {"power_of_two": [4, 64], "prior": 16, "confidence": "low"}
            space[f"update.{index}.alpha"] = {"log_uniform": [alpha / 4, alpha * 4], "prior": alpha}
        space[f"update.{index}.dropout"] = {"uniform": [0.0, 0.2], "prior": 0.05, "confidence": "low"}
    return space


def likely_rate(model: DecoderConfig) -> float:
    """The learning rate that is likely best for low-rank terms on a model, to two digits.

    ``10 · 5e-5 · (2000 / width)^p``, as Schulman et al. (2025, LoRA Without Regret, and their tinker-cookbook) fitted
    it to the best rates of Llama and Qwen models: ten times that of full fine-tuning at every width, which falls with
    the width by p = 0.781 (Llama; near the 1 of muP, Yang et al. 2022) or 0.0775 (Qwen). Other families take 0.43, the
    middle of these. Below the narrowest width that they trained all fall by 0.781: a model of 128 (benchmarks/curves)
    has its eight best rates of 64 from 0.002 to 0.014, where that gives 0.0043.
    """
    power = _POWERS.get(model.family, _OTHER_POWER)
    measured = max(model.hidden_size, _NARROWEST)
    narrow = (measured / model.hidden_size) ** _NARROW_POWER
    return _round(_TIMES * _FULL_RATE * (_WIDTH / measured) ** power * narrow, 2)


def _round(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
