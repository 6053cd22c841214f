"""Any optax transformation as the optimizer, over the arrays that a plan trains."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxtune.errors import UserError
from jaxtune.parallel.sharding import named_sharding, replicated
from jaxtune.training.objectives.base import Hyperparameters
from jaxtune.training.optimizers import Optimizer
from jaxtune.updates import ResolvedPlan
from jaxtune.updates.treatments.base import Group

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Transformation(Optimizer):
    """What optax makes of gradients, its learning rate, clipping and decay included, added to what is trained.

    The rules' factors on the learning rate multiply what it adds. Layers of no rule, which share an array with others,
    are not moved, whatever it makes of their gradients, which are zero.

    Attributes:
      plan: what is trained, by which rules.
      transformation: of optax. It may ask for the loss, as ``value``.

    Raises:
      UserError: a rule has a weight decay of its own, which only AdamW by the configuration knows.
    """

    scheduled: ClassVar[bool] = False
    plan: ResolvedPlan
    transformation: optax.GradientTransformation

    def __post_init__(self) -> None:
        for index, rule in enumerate(self.plan.rules):
            if rule.weight_decay is not None:
                raise UserError(
                    f"update.{index}.weight_decay: does nothing with an optax transformation, which has its own decay; "
                    "leave it out, or give optax.add_decayed_weights a mask"
                )

    def init(self, trainable: PyTree) -> PyTree:
        """The transformation's state for what is trained."""
        return self.transformation.init(trainable)

    def apply(
        self,
        gradients: PyTree,
        moments: PyTree,
        trainable: PyTree,
        learning_rate: Float[Array, ""],
        hyperparameters: Hyperparameters,
        loss: Float[Array, ""] | None = None,
    ) -> tuple[PyTree, PyTree, Float[Array, ""]]:
        """One step.

        Args:
          gradients: of the mean loss, congruent with ``trainable``.
          moments: as :meth:`init` made them, or the last call returned them.
          trainable: float32 parameters.
          learning_rate: a further factor on what is added, that of a schedule function; 1 without.
          hyperparameters: the rules' ``learning_rate_scale``.
          loss: of this step.

        Returns:
          The new parameters, the new state, and the gradients' norm.

        Raises:
          UserError: the transformation asks for more than that.
        """
        updates, after = updated(self.transformation, gradients, moments, trainable, loss)

        def moved(array: Array, update: Array, group: Group) -> Array:
            return array + (learning_rate * self._factor(array, group, hyperparameters) * update).astype(array.dtype)

        leaves, structure = jax.tree.flatten(trainable)
        others = (structure.flatten_up_to(tree) for tree in (updates, self.plan.groups()))
        moved_leaves = [moved(*leaf) for leaf in zip(leaves, *others, strict=True)]
        return structure.unflatten(moved_leaves), after, optax.tree.norm(gradients)

    def shardings(self, trainable: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
        """How the state is cut: what stands for a parameter and has its shape like it; all else is on every device.

        Args:
          trainable: shapes and dtypes of what is trained.
          mesh: of the model.
        """
        return shardings_alike(jax.eval_shape(self.init, trainable), trainable, self.plan.axes(), mesh)

    def _factor(self, array: Array, group: Group, hyperparameters: Hyperparameters) -> Float[Array, "..."]:
        """The rules' factor on the learning rate, for each layer of an array that several rules, or none, train."""
        factors = jnp.zeros(array.shape[0], jnp.float32)
        for rule, layers in group.layers.items():
            scale = jnp.asarray(self.plan.rate_scale(group, rule, hyperparameters), jnp.float32)
            if layers is None:
                return scale
            factors = factors.at[jnp.array(layers)].set(scale)
        return factors.reshape(-1, *[1] * (array.ndim - 1))


def updated(
    transformation: optax.GradientTransformation,
    gradients: PyTree,
    state: PyTree,
    trainable: PyTree,
    loss: Float[Array, ""] | None,
) -> tuple[PyTree, PyTree]:
    """What an optax transformation makes of gradients, and its new state.

    Raises:
      UserError: it asks for more than the gradients, the parameters and the loss.
    """
    try:
        return optax.with_extra_args_support(transformation).update(gradients, state, trainable, value=loss)
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        asked = ", ".join(re.findall(r"'(\w+)'", str(error)))
        raise UserError(
            f"optimizer: this optax transformation asks for {asked}, as line searches do; a step gives it the "
            "gradients, the parameters and the loss (value)"
        ) from error


def shardings_alike(state: PyTree, parameters: PyTree, axes: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """How an optax state is cut: what stands for a parameter and has its shape like it, all else on every device.

    Args:
      state: shapes of what the transformation keeps.
      parameters: shapes of what it was made for.
      axes: logical axes of each of these.
      mesh: of the model.
    """
    each = jax.tree.structure(parameters).flatten_up_to(axes)
    known = {
        tuple(path): (leaf.shape, named_sharding(names, leaf.shape, mesh))
        for (path, leaf), names in zip(jax.tree_util.tree_leaves_with_path(parameters), each, strict=True)
    }

    def place(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(tuple(path[start:]), (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)
