"""What the rules of an update plan make of one model: the arrays that are trained, and the model with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from jaxtune.config.update_rules import Rule
from jaxtune.models.declarations import Params
from jaxtune.models.linear import Adapter
from jaxtune.models.weight import readable
from jaxtune.parallel import constrain
from jaxtune.updates.summary import table_rows
from jaxtune.updates.treatments.base import (
    BIAS,
    Arrays,
    Exported,
    Group,
    Room,
    Shape,
    Trained,
    Treatment,
    Values,
    rule_value,
)

Trainable = dict[str, dict[str, Any]]
"""Float32 arrays, or what stands for each: ``{"low_rank": {module: {"a": …, "b": …}}, "full": {parameter: …}}``."""

# These stand in every state, empty where nothing is trained so: files of states are told by what they hold.
_ALWAYS = ("low_rank", "full")


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedPlan:
    """A plan (:class:`.UpdatePlan`) for one model: what is trained, and what the model makes of it.

    Attributes:
      rules: the rules.
      parts: what is done to each stack of arrays that is not left alone.
      base_size: number of parameters of the model.
      tied: the model's head is its embedding table.
      layers: of the model.
    """

    rules: tuple[Rule, ...]
    parts: tuple[Treatment, ...]
    base_size: int
    tied: bool = False
    layers: int = 1

    @property
    def adapters_only(self) -> bool:
        """Whether the model's own arrays stay as they are, so that adapters hold all that is trained."""
        return not any(part.changes_parameters for part in self.parts)

    @property
    def exports(self) -> bool:
        """Whether a PEFT adapter can hold all that is trained."""
        return not self.unexported

    @property
    def alone(self) -> str | None:
        """The kind of PEFT adapter that holds all that is trained, where that is of one method which has one for it."""
        kinds = {part.alone for part in self.parts}
        return next(iter(kinds)) if len(kinds) == 1 else None

    def tensors(self, part: Treatment, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """What a PEFT adapter holds of one of the parts, on the host; see :meth:`Treatment.tensors`."""
        return (part.tensors if self.alone is None else part.tensors_alone)(arrays, fixed, values)

    @property
    def unexported(self) -> tuple[Treatment, ...]:
        """What no PEFT adapter can hold.

        What stands beside an adapter's own modules cannot stand in their place, or alone. PEFT copies modules that it
        saves, so that a head that is tied to the embedding table would keep the base's.
        """
        if self.alone is not None:
            return ()
        adapted = {part.path: part.peft_type for part in self.parts if part.peft_type is not None}

        def held(part: Treatment) -> bool:
            if part.peft_type is not None:
                return True
            fits = part.beside == "any" or set(adapted.values()) == {part.beside}
            copied = part.beside == "any" and self.tied and part.module == "embed"
            # Of adapted modules a LoRA holds the biases.
            apart = part.module not in adapted or (part.path.endswith(BIAS) and adapted[part.module] == "LORA")
            return bool(adapted) and part.beside is not None and fits and apart and not copied

        return tuple(part for part in self.parts if not held(part))

    @property
    def owned(self) -> frozenset[str]:
        """Paths of arrays of the model that live in the state from the start on."""
        return frozenset[str]().union(*(part.owns for part in self.parts))

    def start(
        self, key: Key[Array, ""], params: Params, values: Values, mesh: jax.sharding.Mesh | None = None
    ) -> tuple[Trainable, Trainable]:
        """What is trained (float32) and what is fixed with it, at the start: the model computes what the base does.

        Args:
          key: of what is random.
          params: of the base.
          values: hyperparameters.
          mesh: on which what a part needs whole is brought together, inside ``jax.jit``; None where nothing is cut.
        """
        base = readable(params, mesh)

        def whole(array: Array) -> Array:
            return constrain(array, (None,) * array.ndim, mesh)

        def started(part: Treatment) -> tuple[Arrays, Arrays]:
            if not part.whole:
                return part.init(key, base, values)
            # Where what comes out of a loop is cut, its steps are too.
            return jax.tree.map(whole, part.init(key, {path: whole(base[path]) for path in part.whole}, values))

        begun = [started(part) for part in self.parts]
        trainable = self._tree([arrays for arrays, _ in begun], _ALWAYS)
        return trainable, self._tree([fixed or None for _, fixed in begun])

    def init(self, key: Key[Array, ""], params: Params) -> Trainable:
        """The trainable parameters at the start, by the rules' own numbers; see :meth:`start`."""
        return self.start(key, params, {})[0]

    @property
    def draws(self) -> bool:
        """Whether something is drawn on the host."""
        return any(part.draw(0, 0, {}) for part in self.parts)

    @property
    def repeating(self) -> tuple[int, ...]:
        """The rules of which something is drawn again after the start."""
        return tuple(sorted({rule for part in self.parts if part.repeats for rule in part.used_rules}))

    def begins(self, step: int, values: Values) -> bool:
        """Whether something is drawn again before a step."""
        return any(part.begins(step, values) for part in self.parts)

    def drawn(self, seed: int, step: int, values: Values) -> Trainable:
        """What is drawn for a step, on the host: it follows from these alone.

        Args:
          seed: of the run.
          step: that comes next.
          values: numbers of the rules, on the host.
        """
        return self._tree([part.draw(seed, step, values) or None for part in self.parts])

    def redraw(
        self, drawn: Trainable, trainable: Trainable, fixed: Trainable
    ) -> tuple[Trainable, Trainable, Trainable]:
        """What is trained, what is fixed, and whose moments it has, with what was drawn; see :meth:`Treatment.redraw`.

        Args:
          drawn: as :meth:`drawn` gives it.
          trainable: before.
          fixed: before.
        """
        places: Trainable = {}
        after, kept = (overlaid(tree, {}) for tree in (trainable, fixed))
        for part in self.parts:
            if (given := drawn.get(part.store, {}).get(part.path)) is not None:
                before = after[part.store][part.path], kept[part.store][part.path]
                made = part.redraw(given, *before)
                after[part.store][part.path], kept[part.store][part.path], where = made
                places.setdefault(part.store, {})[part.path] = where
        return after, kept, places

    def apply(
        self,
        params: Params,
        trainable: Trainable,
        hyperparameters: Values,
        dropout_seed: UInt32[Array, ""] | None = None,
        fixed: Trainable | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> tuple[Params, dict[str, Adapter]]:
        """What the trainable parameters make of the model; made to be called inside ``jax.jit`` and differentiated.

        Args:
          params: of the base; not changed.
          trainable: as from :meth:`init`; parts whose arrays are not there leave the model as it is.
          hyperparameters: ``update.<i>.rank``, ``alpha``, ``dropout``; at most the capacity for a rank. The rule's own
            value where a key is missing.
          dropout_seed: of this step; None for no dropout.
          fixed: what is fixed, as from :meth:`start`.
          mesh: that the parameters are cut over; without it what is computed is the same, and may be moved about more.

        Returns:
          The parameters with the changed ones in place, and the adapters by module path.
        """
        merged, adapters, base = dict(params), {}, readable(params, mesh)
        for part in self.parts:
            arrays = trainable.get(part.store, {}).get(part.path)
            if arrays is None:
                continue
            kept = (fixed or {}).get(part.store, {}).get(part.path, {})
            effect = part.apply(base, arrays, kept, hyperparameters, dropout_seed)
            merged.update(effect.params)
            adapters.update(effect.adapters)
        return merged, adapters

    def groups(self) -> Trainable:
        """How the optimizer moves each trainable array: a :class:`Group` in place of the array."""
        return self._tree([part.groups() for part in self.parts], _ALWAYS)

    def rule_layers(self) -> Trainable:
        """Which rule trains which layers of each trainable array: a mapping in place of the array.

        Its values are layer numbers in the array, ascending, or None for all that there is; adapters' arrays have
        layers of no rule as well, which nothing trains.
        """
        return jax.tree.map(lambda group: group.layers, self.groups())

    def rate_scale(self, group: Group, rule: int, values: Values) -> Float[Array, ""] | float | int:
        """The factor on the learning rate of what a rule trains of an array."""
        factors = [rule_value(self.rules, rule, name, values) for name in ("learning_rate_scale", *group.factors)]
        scale = math.prod(factors[1:], start=factors[0])
        return scale if group.moves is None else scale * group.moves(rule, values)

    def weight_decay(self, group: Group, rule: int, values: Values) -> Float[Array, ""] | float | int:
        """The weight decay of what a rule trains of an array; ``optimizer.weight_decay`` by default."""
        return rule_value(self.rules, rule, "weight_decay", values) if group.decays else 0.0

    def layer_factors(self, fixed: Trainable, values: Values) -> Trainable:
        """What is left of a step of each array of rules with a ``layer_decay``: a factor, or one for each layer it has.

        Layers below the last one have a power of it, embeddings one more than the first layer, head and last norm none.

        Args:
          fixed: what is fixed.
          values: hyperparameters.
        """
        found: Trainable = {}
        for part in self.parts:
            decays: dict[int, Any] = {
                rule: jnp.asarray(rule_value(self.rules, rule, "layer_decay", values), jnp.float32)
                for rule in part.used_rules
                if self.rules[rule].layer_decay is not None
            }
            if not decays:
                continue
            layers, rules = part.entries(fixed.get(part.store, {}).get(part.path, {}))
            bases = jnp.stack([decays.get(rule, jnp.float32(1.0)) for rule in rules])
            if part.layered:
                factor = bases ** (self.layers - 1 - jnp.asarray(layers))
            else:
                factor = bases[0] ** (self.layers if part.path.startswith("embed") else 0)
            found.setdefault(part.store, {})[part.path] = factor
        return found

    def axes(self) -> Trainable:
        """Logical axes of each trainable array, a tuple in place of the array, for sharding."""
        return self._tree([_axes(part.arrays()) for part in self.parts], _ALWAYS)

    def fixed_axes(self) -> Trainable:
        """Logical axes of each fixed array, a tuple in place of the array, for sharding."""
        return self._tree([_axes(part.fixed()) or None for part in self.parts])

    def trainable_parameters(self, hyperparameters: Values | None = None) -> int:
        """Number of trained parameters; of a low-rank term only the active columns count."""
        return sum(each.parameters for each in self._trained(hyperparameters or {}))

    def flops(self, hyperparameters: Values | None = None) -> dict[str, float]:
        """FLOPs of one token forward that are added to each module; backward they cost twice that."""
        return {path: count for part in self.parts for path, count in part.flops(hyperparameters or {}).items()}

    def weight_shares(self) -> dict[str, float]:
        """Share of the layers of each of the model's arrays that gradients are computed for."""
        return {path: share for part in self.parts for path, share in part.weight_share().items()}

    def rooms(self) -> dict[str, dict[str, Room]]:
        """The numbers that bound shapes, by dotted key: for each module, what there is room for."""
        found: dict[str, dict[str, Room]] = {}
        for part in self.parts:
            for key, room in part.rooms().items():
                found.setdefault(key, {})[part.path] = room
        return found

    def table(self, hyperparameters: Values | None = None) -> list[dict[str, Any]]:
        """What is trained, for people: a row for each rule and kind of module, and the totals.

        The share is that of all parameters, those of the adapters among them.
        """
        return table_rows(self.rules, self._trained(hyperparameters or {}), self.base_size)

    def check(self, hyperparameters: Values) -> None:
        """Checks, on the host, that every number fits the arrays: a rank, that it lies between 1 and its capacity.

        Raises:
          UserError: naming the key.
        """
        for part in self.parts:
            part.check(hyperparameters)

    def _trained(self, hyperparameters: Values) -> Iterator[Trained]:
        """What each rule trains of each module or parameter."""
        for part in self.parts:
            yield from part.sizes(hyperparameters)

    def _tree(self, each: Sequence[Any], always: Sequence[str] = ()) -> Trainable:
        """What each part has, by its store and its path; None for nothing."""
        tree: Trainable = {store: {} for store in always}
        for part, value in zip(self.parts, each, strict=True):
            if value is not None:
                tree.setdefault(part.store, {})[part.path] = value
        return tree


def overlaid(tree: Trainable, other: Trainable) -> Trainable:
    """A tree with the arrays of some parts in place of its own."""
    stores = tree.keys() | other.keys()
    return {store: {**tree.get(store, {}), **other.get(store, {})} for store in sorted(stores)}


def _axes(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: shape.axes, shapes, is_leaf=lambda leaf: isinstance(leaf, Shape))
