"""Optimizers that move each tensor by itself: a layer of a stack is a tensor, whatever other layers share its array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtune_kernels.masked_update.rules import corrections
from jaxtyping import Array, Float, Int32

from jaxtune.parallel.sharding import named_sharding
from jaxtune.training.masked_optimizer import clipping
from jaxtune.training.objectives.base import Hyperparameters
from jaxtune.training.optimizers import Optimizer
from jaxtune.updates import ResolvedPlan
from jaxtune.updates.treatments.base import Group

PyTree = Any

Numbers = Mapping[str, Float[Array, ""] | float]
"""The traced numbers of the ``optimizer`` section, by key."""


class Step(NamedTuple):
    """The scalars of one step of one rule's tensors.

    Attributes:
      rate: the learning rate, the rule's factor on it included.
      decay: share of a parameter, times the rate, that is taken off it.
      numbers: of the section.
    """

    rate: Float[Array, ""] | float
    decay: Float[Array, ""] | float
    numbers: Numbers

    def along(self, array: Float[Array, "*shape"], direction: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """A tensor moved against a direction, and decayed."""
        return array - self.rate * (direction + self.decay * array)


class TensorRule(Protocol):
    """How one tensor moves; :class:`PerTensor` maps it over the layers of a stack."""

    def init(self, array: Float[Array, "..."]) -> PyTree:
        """The state at the start."""
        ...

    def apply(
        self, gradient: Float[Array, "..."], state: PyTree, array: Float[Array, "..."], step: Step
    ) -> tuple[Float[Array, "..."], PyTree]:
        """The tensor after a step, given the clipped gradient, and its new state."""
        ...

    def point(self, array: Float[Array, "..."], state: PyTree, numbers: Numbers) -> Float[Array, "..."]:
        """Where the gradient is taken."""
        return array


@dataclasses.dataclass(frozen=True, eq=False)
class PerTensor(Optimizer):
    """Each tensor by a rule of its own, after clipping by global norm (arXiv:1211.5063).

    Layers of no rule of the plan have no state and are not touched.

    Attributes:
      plan: what is trained, by which rules.
      choose: what moves a tensor of a shape that is, or is not, one of a stack's layers.
    """

    plan: ResolvedPlan
    choose: Callable[[tuple[int, ...], bool], TensorRule]

    def init(self, trainable: PyTree) -> PyTree:
        """In place of each array, a state by rule of the plan, which has a leading axis of layers as the array has."""

        def states(array: Array, axes: Any, rules: Any) -> dict[int, Any]:
            init = self._mapped(array, axes, "init")
            return {rule: init(part_of(array, layers)) for rule, layers in rules.items()}

        return jax.tree.map(states, trainable, self.plan.axes(), self.plan.rule_layers())

    def point(self, trainable: PyTree, moments: PyTree, hyperparameters: Hyperparameters) -> PyTree:
        """Where the gradient is taken, tensor by tensor."""
        numbers = _numbers(hyperparameters)

        def point(array: Array, axes: Any, rules: Any, states: Any) -> Array:
            for rule, layers in rules.items():
                at = self._mapped(array, axes, "point", None)(part_of(array, layers), states[rule], numbers)
                array = put_part(array, layers, at)
            return array

        return jax.tree.map(point, trainable, self.plan.axes(), self.plan.rule_layers(), moments)

    def apply(
        self,
        gradients: PyTree,
        moments: PyTree,
        trainable: PyTree,
        learning_rate: Float[Array, ""],
        hyperparameters: Hyperparameters,
        loss: Float[Array, ""] | None = None,
    ) -> tuple[PyTree, PyTree, Float[Array, ""]]:
        """One step; see :meth:`jaxtune.training.optimizers.Optimizer.apply`."""
        norm = optax.tree.norm(gradients)
        clip, numbers = clipping(norm, hyperparameters), _numbers(hyperparameters)

        def moved(array: Array, axes: Any, group: Group, gradient: Array, states: Any) -> tuple[Array, dict[int, Any]]:
            apply, after = self._mapped(array, axes, "apply", None), {}
            for rule, layers in group.layers.items():
                rate = learning_rate * self.plan.rate_scale(group, rule, hyperparameters)
                step = Step(rate, self.plan.weight_decay(group, rule, hyperparameters), numbers)
                part, after[rule] = apply(clip * part_of(gradient, layers), states[rule], part_of(array, layers), step)
                array = put_part(array, layers, part)
            return array, after

        leaves, structure = jax.tree.flatten(trainable)
        trees = (self.plan.axes(), self.plan.groups(), gradients, moments)
        others = (structure.flatten_up_to(tree) for tree in trees)
        pairs = [moved(*leaf) for leaf in zip(leaves, *others, strict=True)]
        return structure.unflatten([array for array, _ in pairs]), structure.unflatten([one for _, one in pairs]), norm

    def shardings(self, trainable: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
        """How the state is cut: a dimension as long as the parameter's in its place is cut like it.

        Args:
          trainable: shapes and dtypes of what is trained.
          mesh: of the model.
        """

        def places(array: Any, axes: tuple[str | None, ...], states: Any) -> Any:
            def place(leaf: Any) -> jax.sharding.NamedSharding:
                return named_sharding(list(_alike(leaf.shape, array.shape, axes)), leaf.shape, mesh)

            return jax.tree.map(place, states)

        return jax.tree.map(places, trainable, self.plan.axes(), jax.eval_shape(self.init, trainable))

    def _mapped(self, array: Any, axes: tuple[str | None, ...], method: str, shared: Any = 0) -> Callable[..., Any]:
        """A method of the rule for an array, mapped over its layers where it has some; ``shared``: of the last one."""
        stacked = axes[0] == "layers"
        function = getattr(self.choose(array.shape[1:] if stacked else array.shape, stacked), method)
        if not stacked:
            return function
        inputs = {"init": 0, "point": (0, 0, shared), "apply": (0, 0, 0, shared)}[method]
        return jax.vmap(function, in_axes=inputs)


class AdamState(NamedTuple):
    """Of one tensor.

    Attributes:
      steps: done.
      mean: running mean of gradients.
      square: running mean of their squares.
    """

    steps: Int32[Array, "*n"]
    mean: Float[Array, "..."]
    square: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW (arXiv:1711.05101, algorithm 2) by ``beta1``, ``beta2`` and ``epsilon``, for what another rule leaves."""

    def init(self, array: Float[Array, "..."]) -> AdamState:
        """Means of zero."""
        return AdamState(jnp.int32(0), jnp.zeros_like(array), jnp.zeros_like(array))

    def point(self, array: Float[Array, "..."], state: AdamState, numbers: Numbers) -> Float[Array, "..."]:
        """At the tensor."""
        return array

    def apply(
        self, gradient: Float[Array, "..."], state: AdamState, array: Float[Array, "..."], step: Step
    ) -> tuple[Float[Array, "..."], AdamState]:
        """A step along :func:`adam_direction`."""
        direction, after = adam_direction(gradient, state, step.numbers)
        return step.along(array, direction), after


def adam_direction(
    gradient: Float[Array, "*shape"], state: AdamState, numbers: Numbers
) -> tuple[Float[Array, "*shape"], AdamState]:
    """Adam's direction (arXiv:1412.6980, algorithm 1), with its means corrected for their start at zero."""
    steps = state.steps + 1
    b1, b2 = (jnp.asarray(numbers[name], jnp.float32) for name in ("beta1", "beta2"))
    mean = b1 * state.mean + (1 - b1) * gradient
    square = b2 * state.square + (1 - b2) * gradient * gradient
    direction = mean * corrections(steps, b1) / (jnp.sqrt(square * corrections(steps, b2)) + numbers["epsilon"])
    return direction, AdamState(steps, mean, square)


@dataclasses.dataclass(frozen=True, eq=False)
class OfOptax:
    """A tensor along what an optax transformation makes of its gradient.

    Attributes:
      make: the transformation for the section's numbers, which are traced; its updates point uphill, without a rate.
      numbers: of the section itself, by which the state's shape is found.
    """

    make: Callable[[Numbers], optax.GradientTransformation]
    numbers: Numbers

    def init(self, array: Float[Array, "..."]) -> PyTree:
        """The transformation's state."""
        return self.make(self.numbers).init(array)

    def point(self, array: Float[Array, "..."], state: PyTree, numbers: Numbers) -> Float[Array, "..."]:
        """At the tensor."""
        return array

    def apply(
        self, gradient: Float[Array, "..."], state: PyTree, array: Float[Array, "..."], step: Step
    ) -> tuple[Float[Array, "..."], PyTree]:
        """A step along the update."""
        direction: Any
        direction, after = self.make(step.numbers).update(gradient, state, array)
        return step.along(array, direction), after


def _numbers(hyperparameters: Hyperparameters) -> Numbers:
    prefix = "optimizer."
    return {key.removeprefix(prefix): value for key, value in hyperparameters.items() if key.startswith(prefix)}


def part_of(array: Array, layers: tuple[int, ...] | None) -> Array:
    """Some layers of a stack, or all that there is."""
    return array if layers is None else array[jnp.array(layers, jnp.int32)]


def put_part(array: Array, layers: tuple[int, ...] | None, part: Array) -> Array:
    """A stack with other values in some of its layers."""
    if layers is None:
        return part
    return array.at[jnp.array(layers, jnp.int32)].set(part, indices_are_sorted=True, unique_indices=True)


def _alike(shape: tuple[int, ...], whole: tuple[int, ...], axes: tuple[str | None, ...]) -> Iterator[str | None]:
    """The logical axis of each dimension of a state that is a parameter's too."""
    for number, size in enumerate(shape):
        yield axes[number] if number < len(whole) and whole[number] == size else None
