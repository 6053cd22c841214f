"""Training that starts from an adapter: what it says of the rules, and the arrays to start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import Config, with_overrides
from jaxtune.config.paths import located
from jaxtune.config.update_rules import Rule, reference_update
from jaxtune.errors import UserError
from jaxtune.models import Decoder, DecoderConfig, read_config
from jaxtune.training.model_directory import model_directory
from jaxtune.updates import UpdatePlan
from jaxtune.updates.peft.base import check_base
from jaxtune.updates.peft.load import Adapter, adapter_rules, read_adapter
from jaxtune.updates.treatments.base import NO_RULE

_KEY = "model.adapter"

_Term = tuple[str, dict[str, Any]]
"""The method, as its arrays are stored, and the numbers that an adapter settles, by name."""


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
    if config.update == list(reference_update()):
        return with_overrides(config, {"update": [rule.model_dump() for rule in rules]})
    _check_rules(config.update, rules, decoder, directory)
    return config


def load_start(config: Config, model: Decoder) -> Adapter | None:
    """The arrays of ``model.adapter``, cut over the model's mesh; None without one.

    Raises:
      UserError: the adapter cannot be read, or does not fit the model.
    """
    if config.model.adapter is None:
        return None
    return read_adapter(located(config).model.adapter or "", model)


def _check_rules(given: Sequence[Rule], rules: Sequence[Rule], decoder: DecoderConfig, directory: Path) -> None:
    """Refuses rules whose low-rank terms are not those of the adapter."""
    here, there = _terms(given, decoder), _terms(rules, decoder)
    problems = []
    for place in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(place), there.get(place)
        if ours is None or theirs is None or not _equal(ours, theirs):
            problems.append(f"{place}: {_told(theirs)} there, {_told(ours)} here")
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"update: {_KEY} settles modules, ranks and alphas, and {directory} has others ({'; '.join(problems[:4])}"
            f"{more}); leave update out, or leave the adapter out"
        )


def _equal(ours: _Term, theirs: _Term) -> bool:
    """Whether they are of one method, and their numbers are the same to rounding."""
    (store, here), (other, there) = ours, theirs
    return store == other and all(
        here[name] == there[name]
        if isinstance(here[name], str)
        else math.isclose(here[name], there[name], rel_tol=1e-6)
        for name in here
    )


def _told(term: _Term | None) -> str:
    """A method's numbers; ``low_rank`` is what an adapter is called that no more is known of."""
    if term is None:
        return "nothing"
    numbers = [f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in term[1].items()]
    return " with ".join([*([] if term[0] == "low_rank" else [term[0]]), *numbers])


def _terms(rules: Sequence[Rule], decoder: DecoderConfig) -> dict[str, _Term]:
    """What an adapter settles of each module of each layer that has one."""
    found = {}
    for part in UpdatePlan(rules).resolve(decoder).parts:
        for layer, index in enumerate(part.rules):
            if index != NO_RULE and not part.changes_parameters:
                path = part.path.replace("layers.", f"layers.{layer}.", 1) if part.layered else part.path
                found[path] = part.store, part.settled(index)
    return found
