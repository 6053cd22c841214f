"""The full treatment of one parameter: itself in float32, all of it or a stack of some of its layers."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class FullParameter:
    """A parameter that is trained itself.

    Attributes:
      path: of the parameter, ``layers.mlp.up.kernel``.
      shape: of the whole parameter, with all of its layers.
      axes: its logical axes.
      layers: the trained layers, ascending; None if it has no layer axis.
      rules: the rule of each trained layer; a single entry without a layer axis.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    layers: tuple[int, ...] | None
    rules: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the layers that are trained."""
        return 1.0 if self.layers is None else len(self.layers) / self.shape[0]

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return math.prod(self.shape) if self.layers is None else math.prod(self.shape[1:]) * len(self.layers)

    def init(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """The trained layers of the pretrained parameter, in float32."""
        return (value if self.share == 1.0 else value[jnp.array(self.layers)]).astype(jnp.float32)

    def placed(self, value: Float[Array, "..."], trained: Float[Array, "..."]) -> Float[Array, "..."]:
        """The whole parameter with the trained layers in place, in its own dtype."""
        if self.share == 1.0:
            return trained.astype(value.dtype)
        return place_layers(value, trained, jnp.array(self.layers))


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
