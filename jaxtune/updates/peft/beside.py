"""What an adapter holds beside the modules that it adapts: modules saved whole, and embeddings of some tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from jaxtune.config.rule import RuleConfig
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import declare
from jaxtune.updates.patterns import pattern_of
from jaxtune.updates.peft.format import AdapterConfig, is_named, tensor_name
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.trainable_tokens import ROWS, TrainableTokensRule

Modules = Mapping[str, tuple[str, int | None]]
"""Our path of the stack, and the layer, of modules by their names in transformers."""


def beside_names(
    names: Collection[str], adapter: AdapterConfig, modules: Modules, config: DecoderConfig
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The names of what is saved of each module, by the ends of them; and what is wrong with it.

    Args:
      names: of all tensors of the adapter.
      adapter: its configuration.
      modules: of the model, of all kinds.
      config: the model's.
    """
    found: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for module, (path, _) in modules.items():
        rows = path == "embed" and adapter.tokens(module) is not None
        if not rows and not adapter.saves(module):
            continue
        ends = (ROWS,) if rows else ("weight", "bias")
        held = {end: tensor_name(module, end) for end in ends if tensor_name(module, end) in names}
        if not held:
            where = "trainable_token_indices" if rows else "modules_to_save"
            wrong.append(f"{module} is in {where} but has no tensors")
        elif path == "embed" and config.tie_embeddings and not rows:
            wrong.append(f"{module} is in modules_to_save, and the head is tied to it, which PEFT leaves as it was")
        else:
            found[module] = held
    told = adapter.trainable_token_indices
    wrong += [
        f"modules_to_save: the model has no {name}"
        for name in adapter.modules_to_save or ()
        if not any(module.endswith(name) for module in modules)
    ]
    wrong += [
        f"trainable_token_indices: {name} is not the embedding table"
        for name in (told if isinstance(told, dict) else ())
        if not any(path == "embed" and is_named(module, [name]) for module, (path, _) in modules.items())
    ]
    return found, wrong


def bias_names(
    names: Collection[str], adapter: AdapterConfig, modules: Modules, config: DecoderConfig
) -> tuple[dict[str, str], list[str]]:
    """The names of trained biases, by the module that has each, that ``bias`` says are there; and what is wrong.

    A module that is adapted has its bias under ``base_layer``. Biases that are saved with their modules are not meant.

    Args:
      names: of all tensors of the adapter.
      adapter: its configuration.
      modules: linear ones of the model.
      config: the model's.
    """
    if adapter.bias == "none":
        return {}, []
    specs, found = declare(config), {}
    having = {name for name, (path, _) in modules.items() if f"{path}.bias" in specs and not adapter.saves(name)}
    for module in having:
        targeted = adapter.targets(module)
        name = tensor_name(module, "base_layer.bias" if targeted else "bias")
        if name in names and (targeted or adapter.bias == "all"):
            found[module] = name
    meant = having if adapter.bias == "all" else {module for module in having if adapter.targets(module)}
    return found, [] if found or not meant else [f"bias is {adapter.bias!r}, but no bias has a tensor"]


def bias_rules(biases: Collection[str], modules: Modules, config: DecoderConfig) -> list[RuleConfig]:
    """A rule for the bias of each kind of module; they stand before those of adapters, which match biases too."""
    layers: dict[str, list[int]] = defaultdict(list)
    for module in biases:
        path, layer = modules[module]
        layers[f"{path}.bias"] += [] if layer is None else [layer]
    paths = {path: tuple(sorted(chosen)) for path, chosen in sorted(layers.items())}
    return [
        FullRule(match=pattern_of([path], chosen, config.num_layers), weight_decay=None)
        for path, chosen in paths.items()
    ]


def beside_rules(
    found: Mapping[str, Mapping[str, str]], adapter: AdapterConfig, modules: Modules, config: DecoderConfig
) -> list[RuleConfig]:
    """A rule for each parameter of what :func:`beside_names` found."""
    rules: list[RuleConfig] = []
    layers: dict[str, list[int]] = defaultdict(list)
    for module, ends in found.items():
        path, layer = modules[module]
        if ROWS in ends:
            rules.append(TrainableTokensRule(match="embed.table", tokens=adapter.tokens(module) or []))
        for ours in (one for one in declare(config) if one.rpartition(".")[0] == path):
            if ("bias" if ours.endswith(".bias") else "weight") in ends:
                layers[ours] += [] if layer is None else [layer]
    whole = {path: pattern_of([path], tuple(chosen), config.num_layers) for path, chosen in layers.items()}
    return rules + [FullRule(match=match, weight_decay=None) for match in whole.values()]
