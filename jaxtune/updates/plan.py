"""What a training run changes: ordered rules, matched with the arrays of one model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxtune.config.update_rules import Rule
from jaxtune.errors import UserError, nearest
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import ArraySpec, declare
from jaxtune.models.decoder import Decoder
from jaxtune.models.families import our_pattern
from jaxtune.updates import treatments
from jaxtune.updates.patterns import Pattern
from jaxtune.updates.resolved import ResolvedPlan
from jaxtune.updates.shared import Shared, SharedRule
from jaxtune.updates.treatments.base import (
    HEAD,
    KERNEL,
    NO_RULE,
    Matched,
    Treatment,
)


@dataclasses.dataclass(frozen=True)
class _Name:
    """One array of one layer: ``layers.7.attention.q.kernel`` of the stack ``layers.attention.q.kernel``."""

    path: str
    stack: str
    layer: int | None
    from_end: str
    """The path with the layer's number from the end, ``layers.-1.attention.q.kernel``."""

    def matches(self, pattern: Pattern) -> bool:
        """Whether a pattern has it, by either number."""
        return pattern.matches(self.path) or pattern.matches(self.from_end)

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
        chosen = {name.path: self._first_match(name) for name in names}
        stacks = {
            stack: Matched(
                stack, spec.shape, spec.axes, tuple(chosen[name.path] for name in names if name.stack == stack)
            )
            for stack, spec in specs.items()
        }
        self._check_rules(names, chosen, stacks)
        self._check_quantized(names, chosen, specs)
        parts: list[Treatment] = []
        for treatment in dict.fromkeys(self._treatments):
            sections = {i: rule for i, rule in enumerate(self.rules) if self._treatments[i] is treatment}
            mine = (
                dataclasses.replace(stack, rules=tuple(i if i in sections else NO_RULE for i in stack.rules))
                for stack in stacks.values()
            )
            served = [stack for stack in mine if set(stack.rules) != {NO_RULE} and treatment.serves(stack)]
            parts += treatment.treat(served, sections, capacity or {})
        if not parts:
            trains = [name for name, treatment in treatments.own().items() if treatment.trains]
            methods = " or ".join([", ".join(trains[:-1]), trains[-1]])
            raise UserError(f"update: every rule freezes; at least one must train something (method {methods})")
        _check_modules(parts)
        _check_alone(parts)
        size = sum(spec.size for spec in specs.values())
        layers = 1 + max(name.layer or 0 for name in names)
        return ResolvedPlan(self.rules, tuple(parts), size, tied=f"{HEAD}{KERNEL}" not in specs, layers=layers)

    @property
    def _treatments(self) -> tuple[type[Treatment], ...]:
        """What treats what each rule matches: methods that share their arrays have one."""
        return tuple(Shared if isinstance(rule, SharedRule) else _treatment(rule.method) for rule in self.rules)

    def _first_match(self, name: _Name) -> int:
        return next((index for index, pattern in enumerate(self._patterns) if name.matches(pattern)), NO_RULE)

    def _check_rules(self, names: Sequence[_Name], chosen: Mapping[str, int], stacks: Mapping[str, Matched]) -> None:
        for index, (rule, pattern) in enumerate(zip(self.rules, self._patterns, strict=True)):
            for alternative in pattern.alternatives:
                if not any(name.matches(alternative) for name in names):
                    raise UserError(f"update.{index}.match: {_unmatched(pattern, alternative, names)}")
            taken = [name for name in names if chosen[name.path] == index]
            if not taken:
                earlier = sorted({chosen[name.path] for name in names if name.matches(pattern)})
                raise UserError(
                    f"update.{index}.match: earlier rules ({', '.join(f'update.{i}' for i in earlier)}) already have "
                    f"everything that {pattern.text!r} matches; the first match wins, so put this rule before them"
                )
            treatment = self._treatments[index]
            if not any(treatment.serves(stacks[name.stack]) for name in taken):
                kinds = _distinct(name.kind for name in taken)
                served = _distinct(
                    name.kind.removesuffix(KERNEL) for name in names if treatment.serves(stacks[name.stack])
                )
                fitting = {"embed.table": "'full' or 'low_rank_embedding'"}.get(kinds[0], "'full'")
                raise UserError(
                    f"update.{index}: method {rule.method} is for {treatment.needs}, but {pattern.text!r} has only "
                    f"{', '.join(kinds)}; use method {fitting} for these, or match {', '.join(served)}"
                )

    def _check_quantized(
        self, names: Sequence[_Name], chosen: Mapping[str, int], specs: Mapping[str, ArraySpec]
    ) -> None:
        for index, (rule, treatment) in enumerate(zip(self.rules, self._treatments, strict=True)):
            taken = [name for name in names if chosen[name.path] == index and specs[name.stack].quantization]
            if taken and treatment.changes_parameters:
                kinds = ", ".join(_distinct(name.kind for name in taken))
                raise UserError(
                    f"update.{index}: method '{rule.method}' trains {kinds}, which model.quantize "
                    f"({specs[taken[0].stack].quantization}) holds as codes that stay frozen; use low_rank for these, "
                    "or leave model.quantize out"
                )


def _treatment(method: str) -> type[Treatment]:
    found = treatments.find(method)
    if found is None:
        raise UserError(f"update: unknown method {method!r}{nearest(method, treatments.names())}")
    return found


def _check_modules(parts: Sequence[Treatment]) -> None:
    """Refuses a linear module whose layers are treated by several methods: each brings a product of its own.

    What lies in the state of one cannot be another's either.
    """
    seen: dict[str, Treatment] = {}
    owners = {path: part for part in parts for path in part.owns}
    for part in parts:
        other = owners.get(part.path, seen.setdefault(part.path, part))
        if other is not part:
            pair = sorted((other, part), key=lambda each: each.used_rules[0])
            (one, first), (two, second) = ((each.used_rules[0], each.sections) for each in pair)
            module = part.path.removesuffix(".bias")
            raise UserError(
                f"update.{two}: {module} has layers of method {first[one].method} (update.{one}) and of "
                f"{second[two].method}; a module is treated by one method, in all of its layers that have any"
            )


def _check_alone(parts: Sequence[Treatment]) -> None:
    """Refuses what only an adapter of its own holds beside something else: at the end nothing could hold both."""
    for part in parts:
        if part.only_alone() and len(parts) > 1:
            rule = part.used_rules[0]
            others = _distinct(each.sections[each.used_rules[0]].method for each in parts if each is not part)
            raise UserError(
                f"update.{rule}: method {part.sections[rule].method} stands alone: no adapter holds it beside "
                f"{', '.join(others)}, and it is in no merged model; leave the other rules out, or this one"
            )


def _declarations(model: Decoder | DecoderConfig | Mapping[str, ArraySpec]) -> Mapping[str, ArraySpec]:
    if isinstance(model, Mapping):
        return model
    return declare(model if isinstance(model, DecoderConfig) else model.config)


def _names(specs: Mapping[str, ArraySpec]) -> Iterator[_Name]:
    for stack, spec in specs.items():
        if not stack.startswith("layers."):
            yield _Name(stack, stack, None, stack)
            continue
        for layer in range(spec.shape[0]):
            numbers = layer, layer - spec.shape[0]
            path, from_end = (stack.replace("layers.", f"layers.{number}.", 1) for number in numbers)
            yield _Name(path, stack, layer, from_end)


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
        return (
            f"{said}: its head is tied to embed.table, so match that with method 'full' to train both, or with "
            "'low_rank_embedding' for the embeddings alone"
        )
    ours = our_pattern(pattern.text)
    if ours != pattern.text and any(name.matches(Pattern(ours)) for name in names):
        return f"{said}; did you mean {ours!r}?"
    wanted = re.sub(r"^layers\.(-?\d+|\{[^{}]*\})(?=\.)", "layers.*", alternative.text)
    if wanted != alternative.text and any(name.matches(Pattern(wanted)) for name in names):
        count = max(name.layer for name in names if name.layer is not None) + 1
        return f"{said}; it has the layers 0 to {count - 1}"
    kinds = _distinct(name.kind for name in names)
    return said + nearest(wanted, _distinct([*(kind.rpartition(".")[0] for kind in kinds), *kinds]))


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
