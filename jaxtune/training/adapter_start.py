"""Training that starts from an adapter: what it says of the rules, and the arrays to start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jaxtune.config import Config, with_overrides
from jaxtune.config.paths import located
from jaxtune.config.update_rules import REFERENCE_UPDATE, LowRankRule, Rule
from jaxtune.errors import UserError
from jaxtune.models import Decoder, DecoderConfig, read_config
from jaxtune.training.model_directory import model_directory
from jaxtune.updates import UpdatePlan, load_adapter
from jaxtune.updates.low_rank import NO_RULE
from jaxtune.updates.peft_base import check_base
from jaxtune.updates.peft_import import adapter_rules
from jaxtune.updates.plan import Trainable

_KEY = "model.adapter"


def with_adapter(config: Config) -> Config:
    """The configuration with the rules of ``model.adapter``.

    Where ``update`` is left at its default it becomes the adapter's rules, which a run then records. Rules that are
    given may say how the adapter's modules move (dropout, weight decay, scale of the rate) and what is trained in full
    beside them.

    Raises:
      UserError: the adapter cannot be read, does not fit the model or was trained on another one, or the rules that are
        given have other modules, ranks or alphas.
    """
    if config.model.adapter is None:
        return config
    model = located(config).model
    directory, base = Path(model.adapter or ""), model_directory(config)
    decoder = read_config(base)
    try:
        rules = adapter_rules(directory, decoder)
    except UserError as error:
        raise UserError(f"{_KEY}: {error}") from error
    check_base(directory, model.path, model.revision, base)
    if config.update == list(REFERENCE_UPDATE):
        return with_overrides(config, {"update": [rule.model_dump() for rule in rules]})
    _check_rules(config.update, rules, decoder, directory)
    return config


def load_start(config: Config, model: Decoder) -> Trainable | None:
    """The arrays of ``model.adapter``, cut over the model's mesh; None without one.

    Raises:
      UserError: the adapter cannot be read, or does not fit the model.
    """
    if config.model.adapter is None:
        return None
    return load_adapter(located(config).model.adapter or "", model)[1]


def _check_rules(given: Sequence[Rule], rules: Sequence[LowRankRule], decoder: DecoderConfig, directory: Path) -> None:
    """Refuses rules whose low-rank terms are not those of the adapter."""
    here, there = _terms(given, decoder), _terms(rules, decoder)
    problems = []
    for place in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(place), there.get(place)
        if ours is None or theirs is None or ours[0] != theirs[0] or not math.isclose(ours[1], theirs[1], rel_tol=1e-6):
            problems.append(f"{place}: {_told(theirs)} there, {_told(ours)} here")
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"update: {_KEY} settles modules, ranks and alphas, and {directory} has others ({'; '.join(problems[:4])}"
            f"{more}); leave update out, or leave the adapter out"
        )


def _told(term: tuple[int, float] | None) -> str:
    return "nothing" if term is None else f"rank {term[0]} with scale {term[1]:g}"


def _terms(rules: Sequence[Rule], decoder: DecoderConfig) -> dict[str, tuple[int, float]]:
    """Rank and scale of each module of each layer that has a low-rank term."""
    plan = UpdatePlan(rules).resolve(decoder)
    found = {}
    for module in plan.modules:
        for layer, index in enumerate(module.rules):
            if index == NO_RULE:
                continue
            rule = plan.rules[index]
            assert isinstance(rule, LowRankRule)
            path = module.path.replace("layers.", f"layers.{layer}.", 1) if module.stacked else module.path
            found[path] = (rule.rank, rule.alpha / (math.sqrt(rule.rank) if rule.use_rslora else rule.rank))
    return found
