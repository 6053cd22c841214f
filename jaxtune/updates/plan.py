"""What a training run changes: ordered rules, and what they make of one model's parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float, Key, UInt32

from jaxtune.config.update_rules import FullRule, LowRankRule, Rule
from jaxtune.errors import UserError, nearest
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import ArraySpec, Params, declare
from jaxtune.models.decoder import Decoder
from jaxtune.models.families import our_pattern
from jaxtune.models.linear import LowRankAdapter
from jaxtune.updates.full import FullParameter
from jaxtune.updates.low_rank import NO_RULE, Hyperparameters, LowRankModule, rule_layers, rule_value
from jaxtune.updates.patterns import Pattern
from jaxtune.updates.summary import Trained, table_rows

Trainable = dict[str, dict[str, Any]]
"""Float32 arrays: ``{"low_rank": {module: {"a": …, "b": …}}, "full": {parameter: …}}``."""

_KERNEL = ".kernel"


@dataclasses.dataclass(frozen=True)
class _Name:
    """One array of one layer: ``layers.7.attention.q.kernel`` of the stack ``layers.attention.q.kernel``."""

    path: str
    stack: str
    layer: int | None

    @property
    def kind(self) -> str:
        """The path with a star for the layer."""
        return self.stack if self.layer is None else self.stack.replace("layers.", "layers.*.", 1)


class UpdatePlan:
    """What changes during training, and how: an ordered list of rules.

    The first rule that matches a parameter decides over it; a parameter that no rule matches stays frozen.

    Args:
      rules: of the configuration key ``update``.

    Raises:
      UserError: there are no rules, or a pattern is malformed.
    """

    def __init__(self, rules: Sequence[Rule]):
        if not rules:
            raise UserError("update: there is no rule; give at least one")
        self.rules = tuple(rules)
        self._patterns = tuple(_pattern(index, rule) for index, rule in enumerate(rules))

    def resolve(
        self, model: Decoder | DecoderConfig | Mapping[str, ArraySpec], capacity: Mapping[str, int] | None = None
    ) -> ResolvedPlan:
        """The plan for one model.

        Args:
          model: a decoder, its configuration, or the table of its arrays.
          capacity: the largest rank that there must be room for, by dotted key (``{"update.0.rank": 64}``); the rule's
            own rank where a key is missing.

        Raises:
          UserError: a rule, or an alternative in its braces, matches nothing; earlier rules leave it nothing; a
            low-rank rule matches no linear layer; or nothing is trained.
        """
        specs = _declarations(model)
        names = list(_names(specs))
        chosen = {name.path: self._first_match(name.path) for name in names}
        self._check_rules(names, chosen)
        ranks = {
            index: max(rule.rank, (capacity or {}).get(f"update.{index}.rank", 0))
            for index, rule in enumerate(self.rules)
            if isinstance(rule, LowRankRule)
        }
        modules, full = [], []
        for stack, spec in specs.items():
            rules = tuple(chosen[name.path] for name in names if name.stack == stack)
            adapted = tuple(i if i in ranks else NO_RULE for i in rules)
            if stack.endswith(_KERNEL) and any(i != NO_RULE for i in adapted):
                *_, inputs, outputs = spec.shape
                axes, room = spec.axes[-2:], max(ranks[i] for i in adapted if i != NO_RULE)
                path = stack.removesuffix(_KERNEL)
                modules.append(LowRankModule(path, inputs, outputs, (axes[0], axes[1]), adapted, room))
            selected = [i for i, rule in enumerate(rules) if rule != NO_RULE and isinstance(self.rules[rule], FullRule)]
            if selected:
                layers = tuple(selected) if stack.startswith("layers.") else None
                full.append(FullParameter(stack, spec.shape, spec.axes, layers, tuple(rules[i] for i in selected)))
        if not modules and not full:
            raise UserError("update: every rule freezes; at least one must train something (method full or low_rank)")
        return ResolvedPlan(self.rules, tuple(modules), tuple(full), sum(spec.size for spec in specs.values()))

    def _first_match(self, path: str) -> int:
        return next((index for index, pattern in enumerate(self._patterns) if pattern.matches(path)), NO_RULE)

    def _check_rules(self, names: Sequence[_Name], chosen: Mapping[str, int]) -> None:
        for index, (rule, pattern) in enumerate(zip(self.rules, self._patterns, strict=True)):
            for alternative in pattern.alternatives:
                if not any(alternative.matches(name.path) for name in names):
                    raise UserError(f"update.{index}.match: {_unmatched(pattern, alternative, names)}")
            taken = [name for name in names if chosen[name.path] == index]
            if not taken:
                earlier = sorted({chosen[name.path] for name in names if pattern.matches(name.path)})
                raise UserError(
                    f"update.{index}.match: earlier rules ({', '.join(f'update.{i}' for i in earlier)}) already have "
                    f"everything that {pattern.text!r} matches; the first match wins, so put this rule before them"
                )
            if isinstance(rule, LowRankRule) and not any(name.stack.endswith(_KERNEL) for name in taken):
                kinds = _distinct(name.kind for name in taken)
                linear = _distinct(name.kind.removesuffix(_KERNEL) for name in names if name.stack.endswith(_KERNEL))
                raise UserError(
                    f"update.{index}: a low-rank rule needs linear layers, but {pattern.text!r} has only "
                    f"{', '.join(kinds)}; use method 'full' for these, or match {', '.join(linear)}"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedPlan:
    """An :class:`UpdatePlan` for one model: which arrays are trained, and what the model makes of them.

    Attributes:
      rules: the rules.
      modules: linear modules with a low-rank term.
      full: parameters that are trained themselves.
      base_size: number of parameters of the model.
    """

    rules: tuple[Rule, ...]
    modules: tuple[LowRankModule, ...]
    full: tuple[FullParameter, ...]
    base_size: int

    @property
    def is_low_rank_only(self) -> bool:
        """Whether an adapter alone holds all that is trained."""
        return not self.full

    def init(self, key: Key[Array, ""], params: Params) -> Trainable:
        """The trainable parameters at the start, float32; the model then computes what the base computes.

        Args:
          key: of the random start of each A.
          params: of the base.
        """
        return {
            "low_rank": {module.path: module.init(key) for module in self.modules},
            "full": {parameter.path: parameter.init(params[parameter.path]) for parameter in self.full},
        }

    def apply(
        self,
        params: Params,
        trainable: Trainable,
        hyperparameters: Hyperparameters,
        dropout_seed: UInt32[Array, ""] | None = None,
    ) -> tuple[Params, dict[str, LowRankAdapter]]:
        """What the trainable parameters make of the model; made to be called inside ``jax.jit`` and differentiated.

        Args:
          params: of the base; not changed.
          trainable: as from :meth:`init`.
          hyperparameters: ``update.<i>.rank``, ``alpha``, ``dropout``; at most the capacity for a rank. The rule's own
            value where a key is missing.
          dropout_seed: of this step; None for no dropout.

        Returns:
          The parameters with the fully trained ones in place, and the adapters by module path.
        """
        merged = dict(params)
        for parameter in self.full:
            merged[parameter.path] = parameter.placed(params[parameter.path], trainable["full"][parameter.path])
        return merged, self.adapters(trainable["low_rank"], hyperparameters, dropout_seed)

    def adapters(
        self,
        low_rank: Mapping[str, Mapping[str, Float[Array, "..."]]],
        hyperparameters: Hyperparameters,
        dropout_seed: UInt32[Array, ""] | None = None,
    ) -> dict[str, LowRankAdapter]:
        """The adapters by module path, of the low-rank part of what is trained; see :meth:`apply`."""
        return {
            module.path: module.adapter(low_rank[module.path], self.rules, hyperparameters, dropout_seed)
            for module in self.modules
        }

    def rule_layers(self) -> Trainable:
        """Which rule trains which layers of each trainable array: a mapping in place of the array.

        Its values are layer numbers in the array, ascending, or None for all that there is; low-rank arrays have layers
        of no rule as well, which nothing trains.
        """
        low_rank = {module.path: rule_layers(module.rules) for module in self.modules}
        return {
            "low_rank": {path: {"a": layers, "b": layers} for path, layers in low_rank.items()},
            "full": {parameter.path: rule_layers(parameter.rules) for parameter in self.full},
        }

    def rule_value(self, rule: int, name: str, hyperparameters: Hyperparameters) -> Float[Array, ""] | float | int:
        """A number of one rule, ``learning_rate_scale`` or ``weight_decay``; ``optimizer.weight_decay`` by default."""
        return rule_value(self.rules, rule, name, hyperparameters)

    def axes(self) -> Trainable:
        """Logical axes of each trainable array, a tuple in place of the array, for sharding."""
        return {
            "low_rank": {module.path: module.logical_axes() for module in self.modules},
            "full": {parameter.path: parameter.axes for parameter in self.full},
        }

    def trainable_parameters(self, hyperparameters: Hyperparameters | None = None) -> int:
        """Number of trained parameters; of a low-rank term only the active columns count."""
        return sum(each.parameters for each in self._trained(hyperparameters or {}))

    def mean_ranks(self, hyperparameters: Hyperparameters | None = None) -> dict[str, float]:
        """The rank in use, averaged over the layers, of each module with a low-rank term."""
        ranks = {module.path: module.ranks(self.rules, hyperparameters or {}) for module in self.modules}
        return {path: sum(values) / len(values) for path, values in ranks.items()}

    def full_shares(self) -> dict[str, float]:
        """Share of the layers that are trained, of each parameter that is trained itself."""
        return {parameter.path: parameter.share for parameter in self.full}

    def table(self, hyperparameters: Hyperparameters | None = None) -> list[dict[str, Any]]:
        """What is trained, for people: a row for each rule and kind of module, and the totals.

        The share is that of all parameters, those of the adapters among them.
        """
        return table_rows(self.rules, self._trained(hyperparameters or {}), self.base_size)

    def check_ranks(self, hyperparameters: Hyperparameters) -> None:
        """Checks, on the host, that every rank lies between 1 and the capacity that the arrays have.

        Raises:
          UserError: naming the key.
        """
        for module in self.modules:
            for index, rank in zip(module.rules, module.ranks(self.rules, hyperparameters), strict=True):
                if index != NO_RULE and not 1 <= rank <= module.capacity:
                    raise UserError(f"update.{index}.rank: {rank} is not between 1 and the capacity {module.capacity}")

    def _trained(self, hyperparameters: Hyperparameters) -> Iterator[Trained]:
        """What each rule trains of each module or parameter."""
        for module in self.modules:
            ranks = module.ranks(self.rules, hyperparameters)
            for rule in module.used_rules:
                layers = tuple(i for i, index in enumerate(module.rules) if index == rule)
                size = ranks[layers[0]] * (module.inputs + module.outputs) * len(layers)
                yield Trained(rule, module.path, layers if module.stacked else None, size, rank=ranks[layers[0]])
        for parameter in self.full:
            for rule in sorted(set(parameter.rules)):
                layers = tuple(
                    layer for layer, i in zip(parameter.layers or (), parameter.rules, strict=False) if i == rule
                )
                size = parameter.size * (len(layers) if parameter.layers else 1) // len(parameter.rules)
                yield Trained(rule, parameter.path, layers if parameter.layers else None, size, rank=None)


def _declarations(model: Decoder | DecoderConfig | Mapping[str, ArraySpec]) -> Mapping[str, ArraySpec]:
    if isinstance(model, Mapping):
        return model
    return declare(model if isinstance(model, DecoderConfig) else model.config)


def _names(specs: Mapping[str, ArraySpec]) -> Iterator[_Name]:
    for stack, spec in specs.items():
        if not stack.startswith("layers."):
            yield _Name(stack, stack, None)
            continue
        for layer in range(spec.shape[0]):
            yield _Name(stack.replace("layers.", f"layers.{layer}.", 1), stack, layer)


def _pattern(index: int, rule: Rule) -> Pattern:
    try:
        return Pattern(rule.match)
    except UserError as error:
        ours = our_pattern(rule.match)
        meant = f"; did you mean {ours!r}?" if ours != rule.match else ""
        raise UserError(f"update.{index}.match: {error}{meant}") from error


def _unmatched(pattern: Pattern, alternative: Pattern, names: Sequence[_Name]) -> str:
    """Why nothing matches, with the nearest patterns that would match something."""
    said = f"{pattern.text!r} matches nothing in the model"
    if alternative.text != pattern.text:
        said = f"the alternative {alternative.text!r} of {said}"
    if alternative.matches("lm_head.kernel"):
        return f"{said}: its head is tied to embed.table"
    ours = our_pattern(pattern.text)
    if ours != pattern.text and any(Pattern(ours).matches(name.path) for name in names):
        return f"{said}; did you mean {ours!r}?"
    wanted = re.sub(r"^layers\.(\d+|\{[^{}]*\})(?=\.)", "layers.*", alternative.text)
    if wanted != alternative.text and any(Pattern(wanted).matches(name.path) for name in names):
        count = max(name.layer for name in names if name.layer is not None) + 1
        return f"{said}; it has the layers 0 to {count - 1}"
    kinds = _distinct(name.kind for name in names)
    return said + nearest(wanted, _distinct([*(kind.rpartition(".")[0] for kind in kinds), *kinds]))


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
