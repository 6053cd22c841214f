"""A linear layer of a stack of which some layers are trained themselves, others from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxtune.models.linear import Adapter, FrozenLayer, kept


@dataclasses.dataclass(frozen=True, init=False)
class SelectedKernel(Adapter):
    """In place of a layer's own kernel another one, if the layer is selected.

    The kernels of selected layers reach every layer whole, so that the scan over the layers adds their gradients in one
    array of as many kernels. A layer that is not selected makes none: whether it is decides a branch, not a mask.

    A pytree.

    Attributes:
        values: Kernels of the selected layers, float32, in any order.
        slot: Where a layer's kernel is among these; anything where it is not.
        trained: Whether the layer is selected.
    """

    values: Float[Array, "chosen inputs outputs"]
    slot: Int32[Array, "*layers"]
    trained: Bool[Array, "*layers"]

    # Leaves are not annotated: jax also builds this tree with shapes, shardings, axes or placeholders for leaves.
    def __init__(self, values: Any, slot: Any, trained: Any) -> None:
        for name, value in (("values", values), ("slot", slot), ("trained", trained)):
            object.__setattr__(self, name, value)

    def product(self, layer: FrozenLayer) -> Float[Array, "*rows outputs"]:
        """``x W + bias`` with the kernel in use."""
        assert isinstance(layer.kernel, jax.Array)
        return kept(layer.biased(_product(layer.x, self.values, layer.kernel, self.slot, self.trained)))

    def unscanned(self) -> Any:
        """The kernels of selected layers."""
        return self.values

    def scanned(self) -> Adapter:
        """Without them."""
        return SelectedKernel(None, self.slot, self.trained)

    def joined(self, whole: Any) -> Adapter:
        """With them again."""
        return SelectedKernel(whole, self.slot, self.trained)

    def batch_axes(self, axis: int) -> Any:
        """What is whole has no layers."""
        return SelectedKernel(0, axis, axis)

    def merged(
        self, kernel: Float[Array, "inputs outputs"], bias: Float[Array, " outputs"] | None
    ) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"] | None]:
        """The kernel in use, as it is."""
        return _in_use(self.values, kernel, self.slot, self.trained), bias


jax.tree_util.register_dataclass(SelectedKernel, data_fields=["values", "slot", "trained"], meta_fields=[])


def _in_use(values: Array, kernel: Array, slot: Array, trained: Array) -> Array:
    chosen = lax.dynamic_index_in_dim(values, slot, keepdims=False)
    return jnp.where(trained, chosen.astype(kernel.dtype), kernel)


@jax.custom_vjp
def _product(
    x: Float[Array, "*rows inputs"],
    values: Float[Array, "chosen inputs outputs"],
    kernel: Float[Array, "inputs outputs"],
    slot: Int32[Array, ""],
    trained: Bool[Array, ""],
) -> Float[Array, "*rows outputs"]:
    return jnp.dot(x, _in_use(values, kernel, slot, trained).astype(x.dtype))


def _forward(x: Array, values: Array, kernel: Array, slot: Array, trained: Array) -> tuple[Array, tuple[Array, ...]]:
    # Not the kernel in use: the scan would stack it for all layers, where it holds these anyway.
    return _product(x, values, kernel, slot, trained), (x, values, kernel, slot, trained)


def _backward(held: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None, None, None]:
    x, values, kernel, slot, trained = held
    used = _in_use(values, kernel, slot, trained).astype(x.dtype)
    of_x = lax.dot_general(gradient, used, (((gradient.ndim - 1,), (1,)), ((), ())))
    rows = tuple(range(x.ndim - 1))

    def of_kernel() -> Array:
        # In the compute dtype, which is what devices add up of it.
        return lax.dot_general(x, gradient, ((rows, rows), ((), ())))

    of_kernel_or_nothing = lax.cond(trained, of_kernel, lambda: jnp.zeros(kernel.shape, x.dtype))
    zeros = jnp.zeros(values.shape, values.dtype)
    of_values = lax.dynamic_update_index_in_dim(zeros, of_kernel_or_nothing.astype(values.dtype), slot, 0)
    return of_x, of_values, None, None, None


_product.defvjp(_forward, _backward)
