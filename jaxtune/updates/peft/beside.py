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
