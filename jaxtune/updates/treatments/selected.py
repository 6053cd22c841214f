"""Parameters of which some layers are trained themselves, chosen anew as often as a rule says.

What is trained is as many layers of a stack at all times, so another choice is another argument of one program. The
stack itself lies in the state: trained layers are written back to it when others take their place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import PositiveInt, Traced
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jnp, np
from jaxtune.updates.treatments.base import (
    KERNEL,
    NO_RULE,
    Arrays,
    Effect,
    Group,
    Matched,
    Shape,
    Trained,
    Treatment,
    Values,
)
from jaxtune.updates.treatments.full import Full

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Int, Key, UInt32

Period = Annotated[PositiveInt, Traced()]
"""Steps of a round."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a choice among the layers of one stack is made by.

    Attributes:
      rule: index of the rule.
      layers: those of the stack that match it, ascending.
      count: how many of them are chosen.
      column: the module of the stack.
      columns: modules whose layers are chosen among together with these, itself among them; in the model's order.
    """

    rule: int
    layers: tuple[int, ...]
    count: int
    column: str
    columns: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Selected(Treatment):
    """Some layers of a stack, float32; the stack, in its own dtype, is fixed with them.

    A subclass says how many layers a rule trains, and which ones in each round. Where it serves arrays without a layer
    axis, these are trained at all times.

    Attributes:
      parameter: path of the stack; of a kernel, ``path`` is that of its module.
      shape: of the stack.
      axes: its logical axes.
      choices: of each rule.
    """

    changes_parameters = True
    forgets: ClassVar[bool] = False
    """Whether a layer that stays chosen when a round begins loses its moments, as those do that leave."""

    parameter: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    choices: tuple[Choice, ...]

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """Every parameter can be trained."""
        del array
        return True

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """One for each parameter."""
        del capacity
        stacks = [array for array in arrays if array.layered]
        for array in arrays:
            used = {index: sections[index] for index in sorted(set(array.rules) - {NO_RULE})}
            if not array.layered:
                yield Full(array.path, array.rules, used, array.shape, array.axes)
                continue
            choices = tuple(cls._choice(index, section, array, stacks) for index, section in used.items())
            path = array.path.removesuffix(KERNEL)
            yield cls(path, array.rules, used, array.path, array.shape, array.axes, choices)

    @classmethod
    def _choice(cls, index: int, section: RuleConfig, array: Matched, stacks: Sequence[Matched]) -> Choice:
        layers, kind = _layers(array, index), cls.kind(_module(array))
        alike = (one for one in stacks if cls.kind(_module(one)) == kind and _layers(one, index) == layers)
        columns = tuple(dict.fromkeys(map(_module, alike)))
        return Choice(index, layers, cls.count(index, section, layers), _module(array), columns)

    @classmethod
    def kind(cls, module: str) -> str:
        """What has one name for modules whose layers are chosen among together."""
        return module

    @classmethod
    def count(cls, index: int, section: RuleConfig, layers: Sequence[int]) -> int:
        """How many layers of a stack are trained.

        Args:
          index: of the rule.
          section: the rule.
          layers: that match it.

        Raises:
          UserError: none, or more than there are.
        """
        raise NotImplementedError

    def chosen(self, choice: Choice, seed: int, number: int) -> Sequence[int]:
        """The layers that are trained in a round, by what depends on nothing else; on the host.

        Args:
          choice: what is chosen among.
          seed: of the run.
          number: of the round, from 0 on.
        """
        raise NotImplementedError

    @property
    def owns(self) -> frozenset[str]:
        """The stack."""
        return frozenset({self.parameter})

    @property
    def trained_layers(self) -> int:
        """How many layers are trained at a time."""
        return sum(choice.count for choice in self.choices)

    def arrays(self) -> Arrays:
        """The trained layers, by rule and then as chosen."""
        return Shape((self.trained_layers, *self.shape[1:]), self.axes)

    def fixed(self) -> Arrays:
        """The stack, in its own dtype, and which layers are trained."""
        return {
            "stack": Shape(self.shape, self.axes),
            "layers": Shape((self.trained_layers,), (None,), "int32"),
        }

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """The first layers of each rule, until others are drawn."""
        del key, values
        layers = jnp.array([layer for choice in self.choices for layer in choice.layers[: choice.count]], jnp.int32)
        stack = base[self.parameter]
        return stack[layers].astype(jnp.float32), {"stack": stack, "layers": layers}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """The stack, and where it is one of kernels an adapter; trained vectors are written into theirs."""
        del base, values, seed
        stack, layers = fixed["stack"], fixed["layers"]
        if not self.parameter.endswith(KERNEL):
            return Effect({self.parameter: stack.at[layers].set(arrays.astype(stack.dtype), unique_indices=True)})
        from jaxtune.models.selected_kernel import SelectedKernel

        places = jnp.arange(self.trained_layers, dtype=jnp.int32)
        slots = jnp.zeros(self.shape[0], jnp.int32).at[layers].set(places)
        trained = jnp.zeros(self.shape[0], bool).at[layers].set(True)
        return Effect({self.parameter: stack}, {self.path: SelectedKernel(arrays, slots, trained)})

    @property
    def repeats(self) -> bool:
        """Whether a rule has a period."""
        return any(getattr(section, "period", None) is not None for section in self.sections.values())

    def begins(self, step: int, values: Values) -> bool:
        """Whether a rule's round begins."""
        return step > 0 and any(step % period == 0 for period in self._periods(values).values())

    def draw(self, seed: int, step: int, values: Values) -> dict[str, np.ndarray]:
        """Which layers are trained, and which of them begin anew."""
        periods = self._periods(values)
        layers, anew = [], []
        for choice in self.choices:
            period = periods.get(choice.rule)
            layers += sorted(self.chosen(choice, seed, 0 if period is None else step // period))
            anew += [self.forgets and period is not None and step % period == 0] * choice.count
        return {"layers": np.array(layers, np.int32), "anew": np.array(anew, bool)}

    def redraw(
        self, drawn: Mapping[str, Array], arrays: Arrays, fixed: Arrays
    ) -> tuple[Arrays, Arrays, Int[Array, " chosen"]]:
        """Writes the trained layers back and takes others; those that stay are what they were, to the last bit."""
        before, after = fixed["layers"], drawn["layers"]
        stack = fixed["stack"].at[before].set(arrays.astype(fixed["stack"].dtype), unique_indices=True)
        same = after[:, None] == before[None, :]
        stays, earlier = jnp.any(same, axis=1), jnp.argmax(same, axis=1)
        kept = stays.reshape(-1, *[1] * (len(self.shape) - 1))
        chosen = jnp.where(kept, arrays[earlier], stack[after].astype(arrays.dtype))
        places = jnp.where(stays & ~drawn["anew"], earlier, -1)
        return chosen, {"stack": stack, "layers": after}, places

    def _periods(self, values: Values) -> dict[int, int]:
        """The steps of a round, by rule; rules without rounds are left out."""
        repeated = [index for index, section in self.sections.items() if getattr(section, "period", None) is not None]
        return {index: int(self.value(index, "period", values)) for index in repeated}

    def groups(self) -> Arrays:
        """Each rule's places. Those of vectors are named one by one: each has a number of updates of its own."""
        found: dict[int, tuple[int, ...] | None] = {}
        start = 0
        for choice in self.choices:
            found[choice.rule] = tuple(range(start, start := start + choice.count))
        whole = len(found) == 1 and len(self.shape) > 2
        return Group(dict.fromkeys(found) if whole else found)

    def entries(self, fixed: Arrays) -> tuple[Sequence[int] | Int[Array, " entries"], Sequence[int]]:
        """The trained layers, as drawn."""
        return fixed["layers"], [choice.rule for choice in self.choices for _ in range(choice.count)]

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The parameters of as many layers as are trained at a time."""
        del values
        each = math.prod(self.shape[1:])
        for choice in self.choices:
            told = f"{self.sections[choice.rule].method} {choice.count} of {len(choice.layers)}"
            yield Trained(choice.rule, self.parameter, choice.layers, each * choice.count, told, added=False)

    def weight_share(self) -> dict[str, float]:
        """Of this parameter, at a time."""
        return {self.parameter: self.trained_layers / self.shape[0]}


def _module(array: Matched) -> str:
    return array.path.rpartition(".")[0]


def _layers(array: Matched, index: int) -> tuple[int, ...]:
    return tuple(layer for layer, other in enumerate(array.rules) if other == index)


def period_field(default: int | None, unset: str = "") -> Any:
    """The key ``period`` of a rule."""
    return Field(default=default, description=f"Steps after which other layers are trained.{unset}")


def checked_count(index: int, count: int, layers: Sequence[int]) -> int:
    """A rule's number of ``layers``, if as many match it.

    Raises:
      UserError: there are fewer.
    """
    if count > len(layers):
        raise UserError(
            f"update.{index}.layers: {count} at a time of {len(layers)} that match; give at most {len(layers)}"
        )
    return count
