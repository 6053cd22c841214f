"""AdamW, Lion and momentum with traced hyperparameters, over the arrays that a plan trains."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtune_kernels import MaskedUpdate, Selection, masked_update
from jaxtyping import Array, Float, Int32, Shaped

from jaxtune.parallel.sharding import RULES, cut_axes, named_sharding, replicated
from jaxtune.training.objectives.base import Hyperparameters
from jaxtune.training.optimizers import Optimizer
from jaxtune.updates import ResolvedPlan
from jaxtune.updates.treatments.base import Group

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedOptimizer(Optimizer):
    """An update rule of the masked update after clipping by global norm (arXiv:1211.5063).

    The layers of a stack that one rule trains are updated together, with that rule's factor on the learning rate and
    its weight decay. Layers of no rule have no moments and are not touched.

    Attributes:
      plan: what is trained, by which rules.
      kernels: what computes the update, one of :data:`jaxtune.models.linear.KERNELS`.
      rule: of the masked update: AdamW (arXiv:1711.05101, algorithm 2), ``lion`` or ``sgd``.
      scalars: the rule's numbers, each with its key in the ``optimizer`` section.
    """

    reselects: ClassVar[bool] = True
    plan: ResolvedPlan
    kernels: str = "auto"
    rule: str = "adamw"
    scalars: tuple[tuple[str, str], ...] = (("b1", "beta1"), ("b2", "beta2"), ("epsilon", "epsilon"))

    def init(self, trainable: PyTree) -> PyTree:
        """The moments (float32, zero) of what is trained: in place of each array, a state by rule."""

        def states(array: Array, rules: dict[int, tuple[int, ...] | None]) -> dict[int, Any]:
            update = self._update(array.ndim)
            return {rule: update.init(array, _selection(array.ndim, layers)) for rule, layers in rules.items()}

        return jax.tree.map(states, trainable, self.plan.rule_layers())

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
          learning_rate: of this step.
          hyperparameters: ``optimizer.clip_norm``, ``optimizer.weight_decay`` and the rule's own, and the rules of the
            plan's ``learning_rate_scale`` and ``weight_decay``.
          loss: of this step, which is not asked for.

        Returns:
          The new parameters, the new moments, and the gradients' norm before clipping.
        """
        norm = optax.tree.norm(gradients)
        shared = {name: hyperparameters[f"optimizer.{key}"] for name, key in self.scalars}
        shared["clip"] = clipping(norm, hyperparameters)

        def moved(
            array: Array, axes: Any, group: Group, gradient: Array, states: dict[int, Any]
        ) -> tuple[Array, dict[int, Any]]:
            update, after = self._update(array.ndim, cut_axes(axes)), {}
            for rule, state in states.items():
                rate = learning_rate * self.plan.rate_scale(group, rule, hyperparameters)
                decay = self.plan.weight_decay(group, rule, hyperparameters)
                array, after[rule] = update.apply(gradient, state, array, rate, weight_decay=decay, **shared)
            return array, after

        leaves, structure = jax.tree.flatten(trainable)
        others = (structure.flatten_up_to(tree) for tree in (self.plan.axes(), self.plan.groups(), gradients, moments))
        pairs = [moved(*leaf) for leaf in zip(leaves, *others, strict=True)]
        return structure.unflatten([array for array, _ in pairs]), structure.unflatten([one for _, one in pairs]), norm

    def reselect(self, moments: PyTree, places: PyTree) -> PyTree:
        """Moments, and numbers of updates, go with layers that stay; new ones start at zero."""
        groups = self.plan.groups()

        def moved(states: dict[int, Any], earlier: Array, group: Group) -> dict[int, Any]:
            after = {}
            for rule, state in states.items():
                # A rule has a run of places, and what is trained by it stays in that.
                layers = group.layers[rule] or range(len(earlier))
                before = earlier[layers[0] : layers[-1] + 1] - layers[0]
                after[rule] = state._replace(
                    steps=_taken(state.steps, before), moments=tuple(_taken(each, before) for each in state.moments)
                )
            return after

        result = {store: dict(parts) for store, parts in moments.items()}
        for store, parts in places.items():
            for path, earlier in parts.items():
                result[store][path] = moved(moments[store][path], earlier, groups[store][path])
        return result

    def shardings(self, trainable: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
        """How the moments are cut: each like its parameter.

        Args:
          trainable: shapes and dtypes of what is trained.
          mesh: of the model.
        """

        def place(leaf: Any, axes: tuple[str | None, ...]) -> jax.sharding.NamedSharding:
            if leaf.ndim < 3:  # the numbers of the layers, and of their updates
                return replicated(mesh)
            # Blocks, rows and columns; a vector is one row. What there are several blocks of are layers, never cut.
            return named_sharding((None, *(None, None, *axes)[-2:]), leaf.shape, mesh)

        def places(_: Any, axes: tuple[str | None, ...], states: Any) -> Any:
            return jax.tree.map(lambda leaf: place(leaf, axes), states)

        return jax.tree.map(places, trainable, self.plan.axes(), jax.eval_shape(self.init, trainable))

    def _update(self, dimensions: int, axes: dict[int, tuple[str, ...]] | None = None) -> MaskedUpdate:
        choices = {"auto": None, "interpret": "tpu"}
        # Vectors, stacked or not, are too small to be worth a launch of their own.
        implementation = choices.get(self.kernels, self.kernels) if dimensions > 2 else "xla"
        interpret = self.kernels == "interpret" and implementation == "tpu"
        return masked_update(
            self.rule, axes=axes, trial_axes=RULES["trials"], implementation=implementation, interpret=interpret
        )


def _taken(values: Shaped[Array, "before ..."], places: Int32[Array, " after"]) -> Shaped[Array, "after ..."]:
    """The values of places; zero for a negative one."""
    known = (places >= 0).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.where(known, values[places], 0)


def clipping(norm: Float[Array, ""], hyperparameters: Hyperparameters) -> Float[Array, ""]:
    """The factor that brings gradients of a norm to at most ``optimizer.clip_norm``."""
    return jnp.minimum(1.0, hyperparameters["optimizer.clip_norm"] / jnp.maximum(norm, 1e-16))


def _selection(dimensions: int, layers: tuple[int, ...] | None) -> Selection:
    """Layers of a stack of matrices, or of a stack of vectors, whose layers are its rows."""
    if layers is None:
        return Selection(None)
    return Selection(jnp.array(layers, jnp.int32), (1, None) if dimensions == 2 else (None, None))
