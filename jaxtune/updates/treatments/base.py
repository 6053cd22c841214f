"""What an update method is to the rest: the arrays of one stack that it trains, and what it makes of the model.

A method is one file with a section of the configuration (:class:`~jaxtune.config.rule.RuleConfig`) and a
:class:`Treatment`. A plan makes one treatment for each array, or module, whose layers match rules of the method; all
layers share its arrays, whatever rules they match. No file outside of it knows the method: it is found by its name.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import BesideAdapter
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.records import (
    BIAS,
    HEAD,
    KERNEL,
    NAME,
    NO_RULE,
    Arrays,
    Effect,
    Exported,
    Group,
    Layers,
    Matched,
    Room,
    Shape,
    Trained,
    Values,
)

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Int, Key, UInt32

__all__ = [
    "BIAS",
    "HEAD",
    "KERNEL",
    "NAME",
    "NO_RULE",
    "Arrays",
    "Effect",
    "Exported",
    "Group",
    "Layers",
    "LinearTreatment",
    "Matched",
    "Room",
    "Shape",
    "Trained",
    "Treatment",
    "Values",
    "layers_of",
    "leaves",
    "per_layer",
    "rule_value",
    "zeros",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Treatment:
    """What the rules of one method make of one stack of arrays.

    A subclass declares its ``Section`` and says what differs from these defaults, which are those of a method that
    trains nothing. All methods that take arrays are traced: they are called inside ``jax.jit`` and differentiated.

    Attributes:
      path: of the module or the parameter, ``layers.attention.q``.
      rules: the index of each layer's rule, :data:`NO_RULE` for layers without one; a single entry if not stacked.
      sections: the rules of the method, by index.
    """

    Section: ClassVar[type[RuleConfig]] = RuleConfig
    """Of its rules; ``method`` names the treatment."""
    store: ClassVar[str]
    """Under which its arrays lie in a state, beside the path; the method's name. Treatments of one store are one."""
    needs: ClassVar[str] = "linear layers"
    """What rules of the method are for, in the plural."""
    trains: ClassVar[bool] = True
    """Whether rules of the method train anything."""
    peft_type: ClassVar[str | None] = None
    """The kind of PEFT adapter that holds it; None where there is none."""
    changes_parameters: ClassVar[bool] = False
    """Whether it gives arrays in place of the model's: then there is no base that all states have in common."""
    alone: ClassVar[str | None] = None
    """The kind of PEFT adapter that holds it where nothing else is trained, by :meth:`tensors_alone`."""
    observed: ClassVar[Literal["inputs", "gradients"]] = "inputs"
    """What :meth:`observe` is given of a batch: inputs of its module, or :meth:`of_gradient` of its weights."""
    beside: ClassVar[str | None] = None
    """The kind of PEFT adapter that holds it beside modules of its own, in ``modules_to_save`` say; "any" for any."""

    path: str
    rules: tuple[int, ...]
    sections: Mapping[int, RuleConfig]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "Section" in vars(cls) and "store" not in vars(cls):
            cls.store = cls.Section.model_fields["method"].default

    @classmethod
    def serves(cls, array: Matched) -> bool:
        """Whether the method does something with an array; of what it passes over, nothing is trained."""
        return array.path.endswith(KERNEL)

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """The treatments of a model.

        Args:
          arrays: those that it serves, of which some layers match.
          sections: the rules of the method, by index.
          capacity: the largest value that there must be room for, by dotted key; a rule's own where a key is missing.

        Raises:
          UserError: a rule does not fit an array.
        """
        del arrays, sections, capacity
        return iter(())

    @property
    def owns(self) -> frozenset[str]:
        """Paths of the model's arrays that live in :meth:`fixed` from the start on, and not in the base."""
        return frozenset()

    @property
    def whole(self) -> frozenset[str]:
        """Paths of the model's arrays that :meth:`init` takes layer by layer in a loop, each layer as one matrix;
        it is given these and no others.

        Every device then has all of each before the loop, and all of what ``init`` makes after it, so that the loop has
        no collective: XLA does not order those within a loop and those outside of it, and the devices of a CPU can wait
        for each other for ever.
        """
        return frozenset()

    @property
    def observed_batches(self) -> int:
        """The start is made of what is :attr:`observed` of its module in so many batches; 0 where it needs none."""
        return 0

    @property
    def learns(self) -> Any:
        """Parts of one method for which this is the same learn the same of the same inputs."""
        return self.path

    def observe(self, seen: np.ndarray, learned: Any) -> Any:
        """What is known of its module, on the host, with what one more batch tells.

        Args:
          seen: inputs of some positions whose losses count, float32 ``[layers, positions, inputs]``; or
            :meth:`of_gradient` of each layer, ``[layers, …]``, on average over the microbatches.
          learned: what this gave for the batch before; None for the first one.
        """
        raise NotImplementedError

    def of_gradient(self, gradient: Float[Array, "inputs outputs"]) -> Float[Array, "..."]:
        """What is kept of the gradient of one layer's weights, traced in the backward pass: of one microbatch, of the
        mean loss of the base.

        Args:
          gradient: of the weights, float32; of no other layer there is one at the same time.
        """
        return gradient

    @classmethod
    def informed(cls, parts: Mapping[str, Any], learned: Mapping[str, Any]) -> dict[str, tuple[Arrays, Arrays]]:
        """Trained and fixed arrays of all modules of the method, as NumPy arrays, in place of those of :meth:`init`.

        Args:
          parts: its treatments by path.
          learned: what :meth:`observe` gave for each at last.
        """
        raise NotImplementedError

    def arrays(self) -> Arrays:
        """What the optimizer moves, float32: a tree of :class:`Shape`."""
        return {}

    def fixed(self) -> Arrays:
        """What is kept with it, checkpointed and not moved: a tree of :class:`Shape`."""
        return {}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Trained and fixed arrays at the start; the model then computes what the base computes.

        What is drawn depends on the key, the path, the layer and the place in the array alone, never on a capacity.

        Args:
          key: of what is random.
          base: the model's arrays.
          values: numbers of the rules.
        """
        del key, base, values
        return {}, {}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """What they make of the model.

        Args:
          base: the model's arrays, not changed.
          arrays: trained.
          fixed: kept with them.
          values: numbers of the rules.
          seed: of this step's dropout; None for none.
        """
        del base, arrays, fixed, values, seed
        return Effect()

    @property
    def repeats(self) -> bool:
        """Whether something is drawn again after the start."""
        return False

    def begins(self, step: int, values: Values) -> bool:
        """Whether something is drawn again before a step; 0 is the first one, before which all is drawn."""
        del step, values
        return False

    def draw(self, seed: int, step: int, values: Values) -> dict[str, np.ndarray]:
        """What is drawn for a step, on the host, always as many numbers; empty where nothing is ever drawn.

        Args:
          seed: of the run.
          step: that comes next; what is drawn follows from it, whatever was drawn before.
          values: numbers of the rules.
        """
        del seed, step, values
        return {}

    def redraw(
        self, drawn: Mapping[str, Array], arrays: Arrays, fixed: Arrays
    ) -> tuple[Arrays, Arrays, Int[Array, " chosen"]]:
        """Trained and fixed arrays with what was drawn; the model computes what it did. Compiled once.

        Args:
          drawn: as :meth:`draw` gives it.
          arrays: trained.
          fixed: kept with them.

        Returns:
          Both after it, and for each entry of a trained array's first axis the one before it that has its moments; -1
          for one without.
        """
        raise NotImplementedError

    def groups(self) -> Arrays:
        """How each trained array is moved: a tree like :meth:`arrays`, of :class:`Group`."""
        return _mapped(lambda _: Group(self.layers_of_rules()), self.arrays())

    def entries(self, fixed: Arrays) -> tuple[Sequence[int] | Int[Array, " entries"], Sequence[int]]:
        """The layers that the trained arrays have on their first axis, and the rule of each; 0 and one rule without it.

        Args:
          fixed: what is fixed.
        """
        del fixed
        return range(len(self.rules)), self.rules

    def sizes(self, values: Values) -> Iterator[Trained]:
        """What each rule trains, for the table: by default what :meth:`arrays` hold of each layer."""
        each = sum(_size(shape.shape[1:] if self.layered else shape.shape) for shape in leaves(self.arrays()))
        for rule, layers in self.layers_by_rule():
            name = self.sections[rule].method
            yield Trained(rule, self.path, layers if self.layered else None, each * len(layers), name, added=True)

    def check(self, values: Values) -> None:
        """Looks, on the host, whether the numbers fit the arrays.

        Raises:
          UserError: naming the key.
        """
        del values

    def rooms(self) -> dict[str, Room]:
        """By dotted key, the numbers that bound the shapes of its arrays."""
        return {}

    def weight_share(self) -> dict[str, float]:
        """Share of the layers of each of the model's arrays that gradients are computed for."""
        return {}

    def flops(self, values: Values) -> dict[str, float]:
        """FLOPs of one token forward that are added to each module; backward they cost twice that."""
        del values
        return {}

    def settled(self, index: int) -> dict[str, Any]:
        """What an adapter settles of the layers of a rule: numbers by name, which training from it cannot change."""
        section = self.sections[index]
        return {
            name: getattr(section, name)
            for name, field in type(section).model_fields.items()
            if name not in ("match", "method") and not any(isinstance(mark, BesideAdapter) for mark in field.metadata)
        }

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """What a PEFT adapter holds of it, on the host.

        Args:
          arrays: trained, as NumPy arrays.
          fixed: kept with them, as NumPy arrays.
          values: numbers of the rules.

        Raises:
          UserError: PEFT has nothing like it.
        """
        raise NotImplementedError

    @classmethod
    def only_alone(cls) -> bool:
        """Whether what it trains is in no merged model, and in no adapter with anything else."""
        held = cls.peft_type is not None or cls.beside is not None or cls.changes_parameters
        return cls.alone is not None and not held

    def tensors_alone(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """As :meth:`tensors`, of the kind that holds nothing else."""
        return self.tensors(arrays, fixed, values)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether an ``adapter_config.json`` of its ``peft_type`` is of this method."""
        del config
        return cls.restored is not Treatment.restored

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """Numbers of a rule for a module, by its name in transformers, as that configuration has them."""
        del config, module
        return {}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """Trained and fixed arrays, NumPy ones, of what :meth:`tensors` wrote.

        What follows from the base alone is left out of the fixed ones.

        Args:
          tensors: by the end of their names, of each layer; of layer 0 where there is no layer axis.
        """
        del tensors
        raise NotImplementedError

    @property
    def module(self) -> str:
        """The path of the module that :meth:`tensors` are of."""
        return self.path

    @property
    def layered(self) -> bool:
        """Whether its arrays have a leading layer axis."""
        return self.path.startswith("layers.")

    @property
    def used_rules(self) -> tuple[int, ...]:
        """The rules that at least one layer matches."""
        return tuple(sorted(set(self.rules) - {NO_RULE}))

    def layers_of_rules(self) -> Layers:
        """Which layers each rule has."""
        return layers_of(self.rules)

    def layers_by_rule(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Each rule and its layers; a single 0 without a layer axis."""
        for rule in self.used_rules:
            yield rule, tuple(layer for layer, index in enumerate(self.rules) if index == rule)

    def value(self, index: int, name: str, values: Values) -> Any:
        """A number of one rule: traced where the values hold it, else as configured."""
        return rule_value(self.sections, index, name, values)

    def gathered(self, name: str, values: Values) -> Float[Array, " layers"]:
        """One number of the rules for each layer; 0 where there is no rule."""
        return per_layer({index: self.value(index, name, values) for index in self.used_rules}, self.rules)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearTreatment(Treatment):
    """A treatment of a linear module, in all layers.

    Attributes:
      inputs: width of the input.
      outputs: width of the output.
      axes: logical axes of input and output.
    """

    serves_head: ClassVar[bool] = False
    """Whether its adapters have a ``head_term``: losses are made of the head without its product."""

    inputs: int
    outputs: int
    axes: tuple[str | None, str | None]

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """One for each module; see :meth:`Treatment.treat`."""
        for array in arrays:
            used = {index: sections[index] for index in set(array.rules) - {NO_RULE}}
            if array.path == f"{HEAD}{KERNEL}" and not cls.serves_head:
                index = min(used)
                raise UserError(
                    f"update.{index}: method {used[index].method} does not serve {HEAD}, whose losses are made without "
                    "its product; match other layers, or use method low_rank there"
                )
            *_, inputs, outputs = array.shape
            own = {"inputs": inputs, "outputs": outputs, "axes": array.axes[-2:], **cls.sized(used, capacity)}
            yield cls(path=array.path.rpartition(".")[0], rules=array.rules, sections=used, **own)

    @classmethod
    def sized(cls, sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]) -> dict[str, Any]:
        """Further attributes, which follow from the rules of a module's layers."""
        del sections, capacity
        return {}

    def stacked(self, *dims: tuple[str | None, int]) -> Shape:
        """An array that every layer has: each axis by its logical name and its size."""
        whole = (("layers", len(self.rules)), *dims) if self.layered else dims
        return Shape(tuple(size for _, size in whole), tuple(name for name, _ in whole))

    def of_layers(self, value: Any) -> Any:
        """An array of all layers as one of this module is: without a layer axis if it is not stacked."""
        return value if self.layered else value[0]

    def drawn(self, key: Key[Array, ""], count: int, draw: Callable[[Key[Array, ""]], Any]) -> Any:
        """What ``draw`` gives for each of ``count`` places of a layer, on a last axis, by keys of its own."""
        own = jax.random.fold_in(key, zlib.crc32(self.path.encode()))

        def place(layer: Array, index: Array) -> Array:
            return draw(jax.random.fold_in(jax.random.fold_in(own, layer), index))

        places = jax.vmap(place, in_axes=(None, 0), out_axes=1)
        return self.of_layers(jax.vmap(places, in_axes=(0, None))(jnp.arange(len(self.rules)), jnp.arange(count)))


def rule_value(sections: Mapping[int, RuleConfig] | Sequence[RuleConfig], index: int, name: str, values: Values) -> Any:
    """A number of one rule: traced where the values hold it, else as configured.

    A weight decay that the rule leaves open is the optimizer's.
    """
    value = values.get(f"update.{index}.{name}", getattr(sections[index], name))
    return values[f"optimizer.{name}"] if value is None else value


def layers_of(rules: Sequence[int]) -> Layers:
    """The layers of each rule, given the rule of each layer; None in place of all layers."""
    found = {rule: tuple(i for i, other in enumerate(rules) if other == rule) for rule in sorted(set(rules))}
    found.pop(NO_RULE, None)
    return {rule: None if len(layers) == len(rules) else layers for rule, layers in found.items()}


def per_layer(values: Mapping[int, Any], layers: Sequence[int]) -> Float[Array, " layers"]:
    """The values of the rules that the layers match, as a vector; 0 where a layer matches none."""
    order = sorted(values)
    table = jnp.stack([*(jnp.asarray(values[rule], jnp.float32) for rule in order), jnp.float32(0.0)])
    return table[np.array([order.index(rule) if rule != NO_RULE else len(order) for rule in layers])]


def largest_divisor(number: int, most: int) -> int:
    """The largest number up to ``most`` that divides one: what a block of another size could have."""
    return max(size for size in range(1, min(most, number) + 1) if number % size == 0)


def leaves(tree: Arrays) -> list[Any]:
    """The leaves of a tree of mappings, in the order of their names."""
    if not isinstance(tree, Mapping):
        return [tree]
    return [leaf for name in sorted(tree) for leaf in leaves(tree[name])]


def zeros(shapes: Arrays) -> Arrays:
    """Arrays of nothing, on the host, for a tree of :class:`Shape`."""
    return _mapped(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)


def _mapped(function: Any, tree: Arrays) -> Arrays:
    if not isinstance(tree, Mapping):
        return function(tree)
    return {name: _mapped(function, inner) for name, inner in tree.items()}


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size
