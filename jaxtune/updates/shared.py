"""Rules whose method is an argument of the compiled step: trials that differ in it train side by side, in one program.

Methods share a program where each is :class:`~jaxtune.updates.treatments.low_rank.LowRank` but for what it makes of
the plain term (``changed``), for arrays of its own, its start and its rates. All arrays of all of them are there. Which
of the methods a rule is of is one of its numbers, ``update.0.which``; whether it scales by the root of the rank is
another, ``update.0.root``. What a method changes is changed where it is in use. Arrays that it does not train have no
gradient, so that they count for no norm, and no rate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model

from jaxtune.config.roles import mark_of
from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import Traced
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates import treatments
from jaxtune.updates.treatments.base import (
    NO_RULE,
    Arrays,
    Effect,
    Exported,
    Group,
    Matched,
    Trained,
    Treatment,
    Values,
)
from jaxtune.updates.treatments.low_rank import LowRank, RankRule

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Bool, Int, Key, UInt32

    from jaxtune.models.linear import Adapter

_TOLD = {"match", "method", *RankRule.told}
"""Keys of a rule that no program depends on, as numbers tell what they say."""
_OWN = {"Section", "store", "stage", "serves_head", "whole", "arrays", "fixed", "init", "changed", "groups", "sizes"}
_OWN |= {"check", "flops", "settled", "tensors", "reads", "read_section", "restored"}
"""What methods of one program may have instead of what :class:`LowRank` has."""


class SharedRule(RankRule):
    """A rule of one of several methods; the numbers of all of them are traced."""

    methods: ClassVar[tuple[str, ...]] = ()
    """By the number that says which."""
    which: Annotated[float, Traced()] = Field(description="The place of the rule's method among those of its program.")
    root: Annotated[float, Traced()] = Field(description="1 where the term is scaled by alpha / sqrt(rank), else 0.")

    @property
    def rooted(self) -> bool:
        """As the number says."""
        return self.root > 0


def partners(method: str, methods: Sequence[str]) -> tuple[str, ...]:
    """Those of some methods that share a program with one of them, itself included; it alone where it shares none."""
    shared = tuple(other for other in methods if _shares(other))
    return shared if method in shared else (method,)


@functools.cache
def _shares(method: str) -> bool:
    """Whether a method is LoRA but for what a number can switch on and off."""
    treatment = treatments.find(method)
    if treatment is None or not (issubclass(treatment, LowRank) and issubclass(treatment.Section, RankRule)):
        return False
    keys = ((name, field) for name, field in treatment.Section.model_fields.items() if name not in _TOLD)
    traced = all(mark_of(field, Traced) is not None for _, field in keys)
    derived = treatment.__mro__[: treatment.__mro__.index(LowRank)]
    other = {name for one in derived for name in vars(one) if not name.startswith("__") and hasattr(LowRank, name)}
    return traced and other <= _OWN


def shared_rule(rule: RuleConfig, methods: Sequence[str]) -> SharedRule:
    """A rule as one of a program that several methods share.

    Args:
      rule: of one of the methods.
      methods: as :func:`partners` has them.
    """
    section, given = _section(tuple(methods)), rule.model_dump()
    own = {name: value for name, value in given.items() if name in section.model_fields and name != "method"}
    assert isinstance(rule, RankRule)
    return section(**own, which=methods.index(rule.method), root=float(rule.rooted))


@functools.cache
def _section(methods: tuple[str, ...]) -> type[SharedRule]:
    name = " | ".join(methods)
    fields: dict[str, Any] = {"method": (Literal[name], Field(default=name, description="The methods."))}
    for method in methods:
        for key, field in _treatment(method).Section.model_fields.items():
            if key not in SharedRule.model_fields and key not in _TOLD:
                fields[key] = (field.rebuild_annotation(), Field(default=field.default, description=field.description))
    section = create_model("SharedRule", __base__=SharedRule, **fields)
    section.methods = methods
    return section


def _treatment(method: str) -> type[LowRank]:
    found = treatments.find(method)
    assert found is not None
    assert issubclass(found, LowRank), "only such share a program"
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Shared(LowRank):
    """A linear module whose low-rank term is of one of several methods.

    Attributes:
      members: the treatment by each method, by the number that says which.
    """

    Section = SharedRule
    store = LowRank.store

    members: tuple[LowRank, ...]

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """One for each module, if each of the methods serves it."""
        for array in arrays:
            used = {index: sections[index] for index in set(array.rules) - {NO_RULE}}
            first, *others = used.values()
            assert isinstance(first, SharedRule)
            if any(other.method != first.method for other in others):
                raise UserError(
                    f"update.{max(used)}: its layers of {array.path} are of the methods {used[max(used)].method}, and "
                    f"those of update.{min(used)} of {used[min(used)].method}; a module is treated by one method"
                )
            members = [
                member
                for number, method in enumerate(first.methods)
                for member in _treatment(method).treat(
                    [array], {index: _member_rule(section, number) for index, section in used.items()}, capacity
                )
            ]
            one = members[0]
            assert isinstance(one, LowRank)
            yield cls(
                path=one.path,
                rules=one.rules,
                sections=used,
                inputs=one.inputs,
                outputs=one.outputs,
                axes=one.axes,
                capacity=one.capacity,
                members=tuple(member for member in members if isinstance(member, LowRank)),
            )

    @property
    def whole(self) -> frozenset[str]:
        """What any of the methods takes so."""
        return frozenset[str]().union(*(member.whole for member in self.members))

    def arrays(self) -> Arrays:
        """What any of the methods trains."""
        return {name: shape for member in self.members for name, shape in member.arrays().items()}

    def fixed(self) -> Arrays:
        """What any of the methods fixes, and none trains."""
        trained = self.arrays()
        return {name: shape for member in self.members for name, shape in member.fixed().items() if name not in trained}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """As the method in use starts, and zero in the place of arrays that it has not."""
        trained, shapes = self.arrays(), {**self.arrays(), **self.fixed()}

        def started(member: LowRank) -> Arrays:
            arrays, fixed = member.init(key, base, values)
            held = {**arrays, **fixed}
            return {
                name: held[name].astype(jnp.float32) if name in held else jnp.zeros(shape.shape, jnp.float32)
                for name, shape in shapes.items()
            }

        held: Any = None
        for index in self.used_rules:
            branches = [functools.partial(started, member) for member in self.members]
            begun = jax.lax.switch(self._number(index, values), branches)
            held = begun if held is None else {name: self._where(index, begun[name], held[name]) for name in held}
        return {name: held[name] for name in trained}, {name: held[name] for name in held if name not in trained}

    def _where(self, index: int, one: Array, other: Array) -> Array:
        """The layers of a rule out of one array, the others out of the other."""
        mine = np.array([rule == index for rule in self.rules]).reshape(-1, *[1] * (one.ndim - self.layered))
        return jnp.where(self.of_layers(mine), one, other)

    def _on(self, members: Sequence[LowRank], values: Values) -> Bool[Array, "*layers"]:
        """In which layers one of some methods is in use."""
        which = self.gathered("which", values)
        treated = np.array([index != NO_RULE for index in self.rules])
        numbers = [self.members.index(member) for member in members]
        return self.of_layers(treated & jnp.isin(jnp.round(which).astype(jnp.int32), jnp.array(numbers)))

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """The term, with what each of the methods makes of it where that is in use."""
        held = {**arrays, **fixed}
        for name, array in arrays.items():
            training = [member for member in self.members if name in member.arrays()]
            if len(training) < len(self.members):
                on = self._on(training, values)
                on = on.reshape(*on.shape, *[1] * (array.ndim - on.ndim))
                held[name] = jnp.where(on, array, jax.lax.stop_gradient(array))
        adapter: Adapter = self.adapter(held, values, seed)
        changing: dict[Any, list[LowRank]] = {}
        for member in sorted(self.members, key=lambda member: member.stage):
            changing.setdefault(type(member).changed, []).append(member)
        changing.pop(LowRank.changed, None)
        for each in changing.values():
            adapter = each[0].changed(adapter, held, base, values, self._on(each, values))
        return Effect(adapters={self.path: adapter})

    def groups(self) -> Arrays:
        """Each array at the rate that it has in the method in use, and at none where that does not train it."""
        return {name: self._group(name) for name in self.arrays()}

    def _group(self, name: str) -> Group:
        each = tuple(member.groups().get(name) for member in self.members)
        first, *others = [group for group in each if group is not None]
        assert all(other.decays == first.decays for other in others), "whether an array decays is no number"
        if None not in each and not any(group.factors or group.moves for group in (first, *others)):
            return first
        return dataclasses.replace(first, factors=(), moves=functools.partial(self._moves, each))

    def _moves(self, groups: Sequence[Group | None], index: int, values: Values) -> Any:
        """The factor on an array's rate by the group that it is of in the method in use."""
        factors = [
            0.0 if group is None else math.prod(self.value(index, name, values) for name in group.factors)
            for group in groups
        ]
        return jnp.stack([jnp.asarray(factor, jnp.float32) for factor in factors])[self._number(index, values)]

    def _number(self, index: int, values: Values) -> Int[Array, ""]:
        """Which method a rule is of."""
        return jnp.round(jnp.asarray(self.value(index, "which", values))).astype(jnp.int32)

    def _used(self, values: Values) -> Iterator[tuple[int, LowRank]]:
        """Each rule with the treatment of its layers, on the host."""
        for index in self.used_rules:
            number = int(self.value(index, "which", values))
            rooted = bool(self.value(index, "root", values))
            section: Any = self.sections[index]
            member = self.members[number]
            yield (
                index,
                dataclasses.replace(
                    member,
                    rules=tuple(rule if rule == index else NO_RULE for rule in self.rules),
                    sections={index: _member_rule(section.model_copy(update={"root": float(rooted)}), number)},
                ),
            )

    def sizes(self, values: Values) -> Iterator[Trained]:
        """What the method in use trains."""
        for _, member in self._used(values):
            yield from member.sizes(values)

    def check(self, values: Values) -> None:
        """As the method in use does."""
        for _, member in self._used(values):
            member.check(values)

    def flops(self, values: Values) -> dict[str, float]:
        """Of the method in use."""
        return {self.path: sum(sum(member.flops(values).values()) for _, member in self._used(values))}

    def settled(self, index: int) -> dict[str, Any]:
        """As the method of the section has it."""
        return next(member.settled(index) for rule, member in self._used({}) if rule == index)

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """Those of the method in use."""
        held = {**arrays, **fixed}
        for _, member in self._used(values):
            own, kept = ({name: held[name] for name in names} for names in (member.arrays(), member.fixed()))
            yield from member.tensors(own, kept, values)


def _member_rule(rule: RuleConfig, number: int) -> RuleConfig:
    """The rule of one of the methods that a rule is of, with the numbers of that."""
    assert isinstance(rule, SharedRule)
    section = _treatment(rule.methods[number]).Section
    given = rule.model_dump(exclude={"method"})
    given |= dict.fromkeys(RankRule.told, rule.rooted)
    return section(**{name: value for name, value in given.items() if name in section.model_fields})
