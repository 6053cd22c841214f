"""The layout of a PEFT adapter directory: file and tensor names, and how PEFT reads its patterns.

As PEFT 0.21 does it. Writing is in :mod:`jaxtune.updates.peft.export`, reading in :mod:`jaxtune.updates.peft.load`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from jaxtune.config.section import PositiveInt, Probability
from jaxtune.errors import UserError
from jaxtune.models.architectures import Layout
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import linear_modules
from jaxtune.models.families import checkpoint_module, weight_names

LORA = "LORA"
"""The kind of adapters whose modules may differ in their numbers."""
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from error
    return text


Expression = Annotated[str, AfterValidator(_expression)]
PositiveNumber = Annotated[int | float, Field(gt=0)]


def tensor_name(module: str, end: str) -> str:
    """The name of a tensor of a module, ``lora_A.weight``; of none, that of what stands once for all modules.

    Args:
      module: its name in transformers.
      end: of the tensor's name.
    """
    return f"base_model.model.{module}.{end}" if module else f"base_model.{end}"


def parse_tensor_name(name: str, modules: Collection[str]) -> tuple[str, str] | None:
    """Module and end of a tensor's name, for the names that modules have in transformers.

    Returns:
      An empty module for what stands once for all modules; None for what belongs to no module.
    """
    inside = name.removeprefix("base_model.model.")
    if inside == name:
        return ("", name.removeprefix("base_model.")) if name.startswith("base_model.") else None
    places = [index for index, letter in enumerate(inside) if letter == "."]
    return next(((inside[:at], inside[at + 1 :]) for at in reversed(places) if inside[:at] in modules), None)


class AdapterConfig(BaseModel):
    """``adapter_config.json`` of a LoRA of linear layers, with DoRA's sizes or without.

    These are the keys that every PEFT since 0.6 knows; older releases refuse the rest, so no others are written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True
    r: PositiveInt = 8
    lora_alpha: PositiveNumber = 8
    rank_pattern: dict[Expression, PositiveInt] = {}
    alpha_pattern: dict[Expression, PositiveNumber] = {}
    target_modules: Expression | list[str]
    exclude_modules: Expression | list[str] | None = Field(default=None, exclude=True)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Expression | list[Expression] | None = None
    lora_dropout: Probability = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    use_dora: bool = False
    bias: Literal["none", "lora_only", "all"] = "none"
    # PEFT can do more than this, which is not read here.
    fan_in_fan_out: Literal[False] = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = Field(default=None, exclude=True)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on a linear module, by its name in transformers."""
        if self.exclude_modules and is_named(module, self.exclude_modules):
            return False
        if self.target_modules == "all-linear":
            return module.rpartition(".")[2] != "lm_head"
        by_layer = isinstance(self.target_modules, list) and module not in self.target_modules
        if self.layers_to_transform not in (None, []) and by_layer:
            chosen = self.layers_to_transform
            if self._layer(module) not in (chosen if isinstance(chosen, list) else [chosen]):
                return False
        return is_named(module, self.target_modules)

    def saves(self, module: str) -> bool:
        """Whether PEFT would hold a copy of a module, of any kind, by its name in transformers."""
        return any(module.endswith(name) for name in self.modules_to_save or ())

    def tokens(self, module: str) -> list[int] | None:
        """The tokens whose embeddings PEFT would hold of a table, by its name in transformers."""
        told = self.trainable_token_indices
        if isinstance(told, dict):
            return next((tokens for name, tokens in told.items() if is_named(module, [name])), None)
        return told

    def _layer(self, module: str) -> int | None:
        """The number after the first of ``layers_pattern``, or the first number that is part of a name."""
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns if pattern]
        for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
            if found := re.match(expression, module):
                return int(found[1])
        return None

    def rank(self, module: str) -> int:
        """The rank of a module."""
        key = matching_key(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        """The alpha of a module; its term is scaled by alpha / rank, or by alpha / sqrt(rank) with ``use_rslora``."""
        key = matching_key(self.alpha_pattern, module)
        return float(self.lora_alpha if key is None else self.alpha_pattern[key])


def matching_key(patterns: Iterable[str], module: str) -> str | None:
    """The key of ``rank_pattern`` or ``alpha_pattern`` that holds for a module: the first that matches its end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def is_named(module: str, names: str | list[str]) -> bool:
    """Whether a module is among full names or ends of names, or matches one regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def all_modules(config: DecoderConfig, layout: Layout) -> dict[str, tuple[str, int | None]]:
    """Every linear module by its name in transformers: our path of the stack, and the layer.

    Args:
      config: the model's.
      layout: the names of the class that holds it.
    """
    found: dict[str, tuple[str, int | None]] = {}
    for path in linear_modules(config):
        if not path.startswith("layers."):
            found[layout.spell(checkpoint_module(config, path))] = (path, None)
            continue
        for layer in range(config.num_layers):
            name = checkpoint_module(config, path.replace("layers.", f"layers.{layer}.", 1))
            found[layout.spell(name)] = (path, layer)
    return found


def other_modules(config: DecoderConfig, layout: Layout) -> dict[str, tuple[str, int | None]]:
    """Norms and embeddings, as :func:`all_modules` has the linear ones."""
    found: dict[str, tuple[str, int | None]] = {}
    linear = linear_modules(config)
    for path, name in weight_names(config).items():
        ours = path.rpartition(".")[0]
        if ours not in linear:
            for layer in range(config.num_layers) if name.stacked else (None,):
                module = name.of(layer or 0).rpartition(".")[0]
                found[layout.spell(module)] = (ours, layer)
    return found


def adapter_files(directory: Path) -> tuple[Path, Path]:
    """Configuration and tensors of an adapter directory.

    Raises:
      UserError: one is missing; or the tensors are a pickle, which is never read, since unpickling runs code.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such adapter directory")
    config, tensors = directory / CONFIG_FILE, directory / TENSOR_FILE
    if not config.is_file():
        raise UserError(f"{directory}: no {CONFIG_FILE} there, so this is no PEFT adapter")
    if tensors.is_file():
        return config, tensors
    if (directory / PICKLE_FILE).is_file():
        raise UserError(
            f"{directory / PICKLE_FILE}: a pickle, which can run code and is not read; load it with peft where you "
            f"trust it, and call save_pretrained, which writes {TENSOR_FILE}"
        )
    raise UserError(f"{directory}: {CONFIG_FILE} is there, but {TENSOR_FILE} is missing")
