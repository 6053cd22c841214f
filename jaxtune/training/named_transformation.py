"""A transformation that optax has by name, with traced arguments, over the layers that a plan trains."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import Array, Float

from jaxtune.errors import UserError, nearest
from jaxtune.training.masked_optimizer import clipping
from jaxtune.training.objectives.base import Hyperparameters
from jaxtune.training.optimizers import Optimizer
from jaxtune.training.per_tensor import part_of, put_part
from jaxtune.training.transformation import shardings_alike, updated
from jaxtune.updates import ResolvedPlan
from jaxtune.updates.treatments.base import Group

PyTree = Any

_RATE, _DECAY = "learning_rate", "weight_decay"
# Given by the step, or by the rules.
_SETTLED = {_RATE: "optimizer.learning_rate", _DECAY: "optimizer.weight_decay"}


@dataclasses.dataclass(frozen=True, eq=False)
class NamedTransformation(Optimizer):
    """What a function of optax makes of the clipped gradients of all trained layers together.

    It is made anew in every step, from the traced rate and numbers. Where it takes a learning rate it is given the
    step's, else its updates point uphill and are multiplied by that. Of a decay it is given none: what the rules say is
    taken off afterwards, from the parameters before the step.

    Attributes:
      plan: what is trained, by which rules.
      name: of the function in optax or optax.contrib.
      numbers: its arguments that are traced, with the values by which the state's shape is found.
      options: its other arguments.

    Raises:
      UserError: there is no such function, it makes no transformation, or it has no such argument.
    """

    plan: ResolvedPlan
    name: str
    numbers: Mapping[str, float]
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        known = _arguments(self._function)
        for key in ("numbers", "options"):
            for argument in getattr(self, key):
                if argument in _SETTLED:
                    raise UserError(f"optimizer.{key}.{argument}: {_SETTLED[argument]} says that")
                if argument not in known:
                    near = nearest(argument, [name for name in known if name not in _SETTLED])
                    raise UserError(f"optimizer.{key}.{argument}: {self.name} of optax has no such argument{near}")
        self._made(1.0, self.numbers)

    def init(self, trainable: PyTree) -> PyTree:
        """The transformation's state for the trained layers: in place of each array there is one by rule."""
        return self._made(1.0, self.numbers).init(self._parts(trainable))

    def apply(
        self,
        gradients: PyTree,
        moments: PyTree,
        trainable: PyTree,
        learning_rate: Float[Array, ""],
        hyperparameters: Hyperparameters,
        loss: Float[Array, ""] | None = None,
    ) -> tuple[PyTree, PyTree, Float[Array, ""]]:
        """One step; see :meth:`jaxtune.training.optimizers.Optimizer.apply`.

        Raises:
          UserError: the transformation asks for more than gradients, parameters and loss, or decides by a number that
            is traced.
        """
        norm = optax.tree.norm(gradients)
        clip = clipping(norm, hyperparameters)
        numbers = {name: hyperparameters[f"optimizer.numbers.{name}"] for name in self.numbers}
        clipped = jax.tree.map(lambda gradient: clip * gradient, self._parts(gradients))
        try:
            made = self._made(learning_rate, numbers)
            updates, after = updated(made, clipped, moments, self._parts(trainable), loss)
        except jax.errors.ConcretizationTypeError as error:
            raise UserError(
                f"optimizer.numbers: {self.name} of optax decides by what {' or '.join(numbers) or 'its rate'} is; put "
                "the number under optimizer.options, for which steps are compiled"
            ) from error
        sign = 1.0 if self._takes(_RATE) else -learning_rate

        def moved(array: Array, group: Group, updates: Any) -> Array:
            for rule, layers in group.layers.items():
                scale = self.plan.rate_scale(group, rule, hyperparameters)
                decay = self.plan.weight_decay(group, rule, hyperparameters)
                part = part_of(array, layers)
                step = scale * (sign * updates[rule] - learning_rate * decay * part)
                array = put_part(array, layers, part + step.astype(array.dtype))
            return array

        leaves, structure = jax.tree.flatten(trainable)
        others = (structure.flatten_up_to(tree) for tree in (self.plan.groups(), updates))
        return structure.unflatten([moved(*leaf) for leaf in zip(leaves, *others, strict=True)]), after, norm

    def shardings(self, trainable: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
        """How the state is cut: what stands for a parameter like it; all else is on every device.

        Args:
          trainable: shapes and dtypes of what is trained.
          mesh: of the model.
        """
        parts = jax.eval_shape(self._parts, trainable)
        axes = jax.tree.map(
            lambda _, axes, rules: dict.fromkeys(rules, axes), trainable, self.plan.axes(), self.plan.rule_layers()
        )
        return shardings_alike(jax.eval_shape(self.init, trainable), parts, axes, mesh)

    @property
    def _function(self) -> Callable[..., Any]:
        for module in (optax, optax.contrib):
            found = getattr(module, self.name, None)
            if inspect.isroutine(found) or isinstance(found, functools.partial):
                return found
        makers = [
            name
            for module in (optax, optax.contrib)
            for name, item in vars(module).items()
            if _RATE in _arguments(item)
        ]
        raise UserError(f"optimizer.name: optax has no {self.name!r}{nearest(self.name, makers)}")

    def _takes(self, argument: str) -> bool:
        return argument in _arguments(self._function)

    def _made(self, rate: Float[Array, ""] | float, numbers: Mapping[str, Any]) -> optax.GradientTransformation:
        given = {**self.options, **numbers}
        given |= {name: value for name, value in ((_RATE, rate), (_DECAY, 0.0)) if self._takes(name)}
        try:
            made = self._function(**given)
        except (TypeError, ValueError) as error:
            if isinstance(error, jax.errors.JAXTypeError | UserError):
                raise
            raise UserError(f"optimizer: {self.name} of optax cannot be made of what it is given: {error}") from error
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(f"optimizer.name: {self.name} of optax makes no optimizer, but {type(made).__name__}")
        return made

    def _parts(self, trainable: PyTree) -> PyTree:
        """In place of each array, its layers by rule."""

        def parts(array: Array, rules: Any) -> dict[int, Array]:
            return {rule: part_of(array, layers) for rule, layers in rules.items()}

        return jax.tree.map(parts, trainable, self.plan.rule_layers())


def _arguments(function: Any) -> list[str]:
    """The names of a function's arguments; none where it is no function."""
    is_function = inspect.isroutine(function) or isinstance(function, functools.partial)
    return list(inspect.signature(function).parameters) if is_function else []
