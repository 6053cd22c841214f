"""What treatments say of themselves: shapes, groups of the optimizer, effects on the model, rows of tables, exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxtune.late import TYPES

if TYPE_CHECKING or TYPES:
    from jaxtune.models.linear import Adapter

Values = Mapping[str, Any]
"""Numbers by dotted configuration key, ``update.0.rank``; a rule's own value stands for a key that is missing."""

Arrays = Any
"""A tree of arrays: a mapping by name, or a single array."""

Layers = dict[int, "tuple[int, ...] | None"]
"""Layer numbers by the index of their rule, ascending; None in place of all that there is."""

NO_RULE = -1
"""In place of a rule's index: the layer is left alone."""

KERNEL, BIAS, HEAD = ".kernel", ".bias", "lm_head"

NAME = "{name}"
"""In a list of an adapter's configuration: the name of the module that says so."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array before it exists.

    Attributes:
      shape: its shape; what all layers have is stacked on a first axis.
      axes: the logical name of each axis, which the mesh is cut by; None is never cut.
      dtype: of its elements.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Matched:
    """An array of the model of which some layers match rules of one method.

    Attributes:
      path: of the stack, ``layers.attention.q.kernel``.
      shape: of the whole array.
      axes: its logical axes.
      rules: the index of each layer's rule, :data:`NO_RULE` for the others; a single entry without a layer axis.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    rules: tuple[int, ...]

    @property
    def layered(self) -> bool:
        """Whether there is a layer axis."""
        return self.path.startswith("layers.")


@dataclasses.dataclass(frozen=True)
class Group:
    """How the optimizer moves one trained array.

    Attributes:
      layers: which rule moves which of its layers. Those of no rule are not touched, and have no moments.
      factors: names of numbers of the rule that multiply the learning rate, beside ``learning_rate_scale``.
      decays: whether the rule's weight decay holds.
    """

    layers: Layers
    factors: tuple[str, ...] = ()
    decays: bool = True


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a treatment makes of the model.

    Attributes:
      params: arrays in place of the model's, by path.
      adapters: by the path of the linear module.
    """

    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one rule trains of one module or parameter.

    Attributes:
      rule: index of the rule.
      path: of the module or parameter, stacked.
      layers: the layers, ascending; None if there is no layer axis.
      parameters: their number.
      method: for people, ``low_rank 16``.
      added: whether they come on top of the model's own.
    """

    rule: int
    path: str
    layers: tuple[int, ...] | None
    parameters: int
    method: str
    added: bool


@dataclasses.dataclass(frozen=True)
class Room:
    """Of a number that bounds shapes: what there is room for, and what is of use.

    Attributes:
      capacity: the largest value that the arrays have room for.
      useful: a larger value does nothing more.
    """

    capacity: int
    useful: int


@dataclasses.dataclass(frozen=True)
class Exported:
    """One module of one layer as a PEFT adapter has it.

    Attributes:
      path: of the module, ours; empty for what stands once for all modules.
      layer: its number; None if it is not stacked.
      tensors: by the end of their names, ``lora_A.weight``, shaped as in the file.
      config: what ``adapter_config.json`` says of it beside its ``peft_type``. All modules are targets, but those that
        stand beside these. Of a LoRA ranks and alphas may differ; of lists the union is written, with the module's name
        for :data:`NAME`. All else is the same for all modules.
    """

    path: str
    layer: int | None
    tensors: Mapping[str, Any]
    config: Mapping[str, Any]
