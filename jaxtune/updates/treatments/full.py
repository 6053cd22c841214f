"""Parameters that are trained themselves, in float32: all of a stack, or some of its layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.late import TYPES, jnp, np
from jaxtune.updates.treatments.base import (
    KERNEL,
    NAME,
    NO_RULE,
    Arrays,
    Effect,
    Exported,
    Group,
    Matched,
    Shape,
    Trained,
    Treatment,
    Values,
    layers_of,
)

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Int, Key, UInt32


class FullRule(RuleConfig):
    """Parameters that are trained themselves."""

    method: Literal["full"] = Field(default="full", description="These parameters are trained themselves.")


@dataclasses.dataclass(frozen=True, eq=False)
class Full(Treatment):
    """A parameter that is trained itself.

    Attributes:
      shape: of the whole parameter, with all of its layers.
      axes: its logical axes.
    """

    Section = FullRule
    needs = "parameters"
    changes_parameters = True
    beside = "any"

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

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
        for array in arrays:
            used = {index: sections[index] for index in set(array.rules) - {NO_RULE}}
            yield cls(array.path, array.rules, used, array.shape, array.axes)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The trained layers, ascending; None if it has no layer axis."""
        if not self.layered:
            return None
        return tuple(layer for layer, index in enumerate(self.rules) if index != NO_RULE)

    @property
    def share(self) -> float:
        """Share of the layers that are trained."""
        return 1.0 if self.layers is None else len(self.layers) / self.shape[0]

    def arrays(self) -> Arrays:
        """The trained layers."""
        return Shape(self.shape if self.layers is None else (len(self.layers), *self.shape[1:]), self.axes)

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """The trained layers of the pretrained parameter."""
        del key, values
        value = base[self.path]
        return (value if self.share == 1.0 else value[jnp.array(self.layers)]).astype(jnp.float32), {}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """The whole parameter with the trained layers in place, in its own dtype."""
        del fixed, values, seed
        value = base[self.path]
        if self.share == 1.0:
            return Effect({self.path: arrays.astype(value.dtype)})
        return Effect({self.path: place_layers(value, arrays, jnp.array(self.layers))})

    def groups(self) -> Arrays:
        """Each rule's layers, counted among those that are trained."""
        return Group(layers_of([index for index in self.rules if index != NO_RULE]))

    def entries(self, fixed: Arrays) -> tuple[Sequence[int] | Int[Array, " entries"], Sequence[int]]:
        """The trained layers."""
        del fixed
        return self.layers or (0,), [index for index in self.rules if index != NO_RULE]

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The parameters of each rule's layers."""
        del values
        for rule, layers in self.layers_by_rule():
            size = math.prod(self.shape[1:]) * len(layers) if self.layered else math.prod(self.shape)
            yield Trained(rule, self.path, layers if self.layered else None, size, self.sections[rule].method, False)

    @property
    def module(self) -> str:
        """The module that has the parameter."""
        return self.path.rpartition(".")[0]

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """The parameter of each trained layer, as checkpoints have it."""
        del fixed, values
        for place, layer in enumerate(self.layers or (None,)):
            value = arrays if layer is None else arrays[place]
            held = np.ascontiguousarray(value.T if self.path.endswith(KERNEL) else value)
            yield Exported(self.module, layer, {self._end: held}, {"modules_to_save": [NAME]})

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """The trained layers."""
        held = [tensors[layer][self._end].astype(np.float32) for layer in self.layers or (0,)]
        held = [value.T if self.path.endswith(KERNEL) else value for value in held]
        return np.stack(held) if self.layered else held[0], {}

    @property
    def _end(self) -> str:
        return "bias" if self.path.endswith(".bias") else "weight"

    def weight_share(self) -> dict[str, float]:
        """Of this parameter."""
        return {self.path: self.share}


def place_layers(
    stack: Float[Array, " layers *shape"], chosen: Float[Array, " chosen *shape"], indices: Int[Array, " chosen"]
) -> Float[Array, " layers *shape"]:
    """``stack`` with the layers at ``indices`` replaced.

    The indices may be traced: another choice of as many layers runs the same program.

    Args:
      stack: a parameter of all layers.
      chosen: the new layers.
      indices: where they go; ascending and distinct.
    """
    return stack.at[indices].set(chosen.astype(stack.dtype), indices_are_sorted=True, unique_indices=True)
