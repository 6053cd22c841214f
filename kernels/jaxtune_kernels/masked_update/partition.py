"""The masked update of one tensor: bound to its blocks, made to work under vmap and over a mesh.

Over a mesh, each device updates its share of the tensor, and nothing moves between devices. A dimension that a block
spans is cut inside the blocks: every device holds a part of every selected block. A dimension along which there are
several blocks is cut between them: then so are the slots, and each device must own the blocks of its slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from jaxtune_kernels.masked_update.blocks import Blocks
from jaxtune_kernels.masked_update.operands import Operands, Results, SelectedBlocks, slot_terms
from jaxtune_kernels.masked_update.rules import Coefficients, UpdateRule, corrections, updated
from jaxtune_kernels.transforms import GROUP, Cuts, first_index, grouped, joined, portable, spec_of, without_derivative

Axes = Mapping[int, Sequence[str]]
"""Mesh axes over which the dimensions of a parameter are cut, by number; negative ones count from the last."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """Names for the dimensions of one tensor and of its moments, and the mesh axes of the names."""

    blocks: Blocks
    axes: Axes
    trial_axes: Sequence[str] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensor's dimensions."""
        return (*(f"l{i}" for i in range(len(self.blocks.leading))), "rows", "columns")

    @property
    def param(self) -> str:
        """The dimensions of a group of tensors."""
        return " ".join((GROUP, *self.names))

    @property
    def moment(self) -> str:
        """The dimensions of a group of moments."""
        rows, columns = self._spanned()
        return f"{GROUP} slots {'rows' if rows else 'block_rows'} {'columns' if columns else 'block_columns'}"

    def between(self) -> tuple[str, ...]:
        """The dimensions along which there are several blocks."""
        whole = [name for name, spans in zip(("rows", "columns"), self._spanned(), strict=True) if spans]
        return tuple(name for name in self.names if name not in whole)

    def named_axes(self) -> dict[str, tuple[str, ...]]:
        """The mesh axes of each name.

        Raises:
          ValueError: a dimension is not one of the tensor's.
        """
        rank = len(self.names)
        named: dict[str, tuple[str, ...]] = {}
        for dimension, axes in self.axes.items():
            if not -rank <= dimension < rank:
                raise ValueError(f"there is no dimension {dimension} in a tensor of shape {self.blocks.shape}")
            named[self.names[dimension]] = tuple(axes)
        slots = tuple(axis for name in self.between() for axis in named.get(name, ()))
        return {**named, "slots": slots, "new_slots": slots, GROUP: tuple(self.trial_axes)}

    def local(self, cuts: Cuts, share: tuple[int, ...]) -> Blocks:
        """The blocks of a device's share of the tensor.

        Raises:
          ValueError: slots and tensor are not cut alike, or a cut goes through a block that has neighbours.
        """
        if set(cuts["slots"]) != {axis for name in self.between() for axis in cuts[name]}:
            raise ValueError(
                f"the number of selected blocks, and the tensor's shape {self.blocks.shape}, must divide by the devices"
                f" along the mesh axes {dict(self.axes)} over which its blocks are shared out"
            )
        *leading, rows, columns = share
        spans = self._spanned()
        block = (rows if spans[0] else self.blocks.block_rows, columns if spans[1] else self.blocks.block_columns)
        if (cuts["rows"] and rows % block[0]) or (cuts["columns"] and columns % block[1]):
            raise ValueError(f"a device's share {share} of the tensor does not consist of whole blocks of {block}")
        return Blocks(tuple(leading), rows, columns, *block)

    def local_slots(self, cuts: Cuts, local: Blocks, indices: Int32[Array, "g n"]) -> tuple[Array, Array, Array]:
        """Numbers of the blocks in the device's share, and the identities of their first rows and columns."""
        number, owned = jnp.zeros_like(indices), (indices >= 0) & (indices < self.blocks.count)
        coordinates = jnp.unravel_index(indices, self.blocks.grid)  # which clips
        for name, coordinate, size in zip(self.names, coordinates, local.grid, strict=True):
            if name in self.between():
                coordinate = coordinate - jnp.asarray(first_index(cuts[name], size)).astype(jnp.int32)
                owned &= (coordinate >= 0) & (coordinate < size)
            number = number * size + coordinate
        rows, columns = self.blocks.first_elements(indices)
        spanned_rows, spanned_columns = self._spanned()
        if spanned_rows:
            rows = rows + jnp.asarray(first_index(cuts["rows"], local.rows)).astype(jnp.uint32)
        if spanned_columns:
            columns = columns + jnp.asarray(first_index(cuts["columns"], local.columns)).astype(jnp.uint32)
        # A number outside the tensor, or a block of another device, gets none of the numbers of this device's blocks.
        return jnp.where(owned, number, local.count), rows, columns

    def _spanned(self) -> tuple[bool, bool]:
        return self.blocks.block_rows == self.blocks.rows, self.blocks.block_columns == self.blocks.columns


def update_tensor(
    partition: Partition,
    rule: UpdateRule,
    choose: Callable[[Blocks, Operands], Callable[..., Results]],
    param: Float[Array, "..."],
    grad: Float[Array, "..."],
    moments: tuple[Float[Array, "n block_rows block_columns"], ...],
    indices: Int32[Array, " n"],
    steps: Int32[Array, " n"],
    coefficients: Coefficients,
    seed: UInt32[Array, ""],
) -> Results:
    """One step of one tensor, under any of jit, vmap, scan and a mesh in context.

    Args:
      partition: the tensor's blocks and its place on the mesh.
      rule: how a parameter moves.
      choose: gives the implementation for a device's share.
      param: the tensor.
      grad: like the moments, or like the tensor.
      moments: of the selected blocks.
      indices: their numbers; one outside the tensor selects nothing, and its moments stay.
      steps: how many updates each will have had, with this one.
      coefficients: float32 scalars.
      seed: names the draw of the stochastic rounding.
    """
    whole = grad.shape == param.shape and grad.shape != moments[0].shape
    if not whole and grad.shape != moments[0].shape:
        raise ValueError(
            f"gradients of shape {grad.shape} are neither those of the selected blocks, {moments[0].shape}, nor those"
            f" of the tensor, {param.shape}"
        )

    def launch(cuts: Cuts, param, grad, moments, indices, steps, scalars, seeds) -> Results:
        if not indices.size:
            return param, moments
        local = partition.local(cuts, param.shape[1:])
        numbers, rows, columns = partition.local_slots(cuts, local, indices)
        b1, b2 = scalars[:, 1, None], scalars[:, 2, None]
        slots = SelectedBlocks(numbers, rows, columns, corrections(steps, b1), corrections(steps, b2))
        operands = Operands(param, grad, moments, slots, scalars, seeds)
        return choose(local, operands)(rule, local, operands)

    moment = (partition.moment,) * len(moments)
    call = grouped(
        launch,
        (partition.param, partition.param if whole else partition.moment, moment, "g slots", "g slots", "g k", "g"),
        (partition.param, moment),
        partition.named_axes(),
    )
    shape = partition.blocks.shape

    def update(param, grad, moments, *others) -> Results:
        grad = grad.reshape(shape) if whole else grad
        operands = jax.tree.map(lambda array: array[None], (param.reshape(shape), grad, moments, *others))
        new, moments = call(*operands)
        return new.reshape(param.shape), tuple(m[0] for m in moments)

    scalars = jnp.stack([jnp.asarray(c, jnp.float32) for c in coefficients])
    update = without_derivative(update, "masked_update has no derivative")
    return portable(update, _as_they_are)(param, grad, moments, indices, steps, scalars, seed)


def _as_they_are(param: Array, _: Array, moments: tuple[Array, ...], *__: Array) -> Any:
    """How the results of an update are cut, by type: parameter and moments as before."""
    return joined(*spec_of(param)), tuple(joined(*spec_of(moment)) for moment in moments)


def update_whole(
    blocks: Blocks,
    rule: UpdateRule,
    param: Float[Array, "..."],
    grad: Float[Array, "..."],
    moments: tuple[Float[Array, "n rows columns"], ...],
    steps: Int32[Array, " n"],
    coefficients: Coefficients,
    seed: UInt32[Array, ""],
) -> Results:
    """:func:`update_tensor` of all blocks, each a whole matrix: element by element, which XLA itself maps and cuts."""

    def update(param, grad, moments, steps, scalars, seed) -> Results:
        indices = jnp.arange(blocks.count, dtype=jnp.int32)
        rows, columns = blocks.first_elements(indices)
        stacked = [array.reshape(1, *moments[0].shape) for array in (param, grad, *moments)]
        slots = SelectedBlocks(indices, rows, columns, corrections(steps, scalars[1]), corrections(steps, scalars[2]))
        slots = jax.tree.map(lambda array: array[None], slots)
        operands = Operands(stacked[0], stacked[1], tuple(stacked[2:]), slots, scalars[None], seed[None])
        new, moved = updated(rule, *operands[:3], *slot_terms(operands))
        return new.reshape(param.shape), tuple(m[0] for m in moved)

    scalars = jnp.stack([jnp.asarray(c, jnp.float32) for c in coefficients])
    return portable(update, _as_they_are)(param, grad, moments, steps, scalars, seed)


def carry_moments(
    partition: Partition,
    moments: tuple[Float[Array, "n block_rows block_columns"], ...],
    steps: Int32[Array, " n"],
    old: Int32[Array, " n"],
    new: Int32[Array, " k"],
) -> tuple[tuple[Array, ...], Array]:
    """Moments and numbers of updates for the blocks ``new``: kept for those that stay, zero for those that come."""

    def one(moments, steps, old, new) -> tuple[tuple[Array, ...], Array]:
        if not old.shape[0]:
            return tuple(jnp.zeros((*new.shape, *m.shape[1:]), m.dtype) for m in moments), jnp.zeros_like(new)
        place = jnp.clip(jnp.searchsorted(old, new), 0, old.shape[0] - 1)
        stays = old[place] == new
        kept = tuple(jnp.where(stays[:, None, None], m[place], 0) for m in moments)
        return kept, jnp.where(stays, steps[place], 0)

    def launch(cuts: Cuts, *arrays) -> tuple[tuple[Array, ...], Array]:
        return jax.vmap(one)(*arrays)

    moment = (partition.moment,) * len(moments)
    carried = tuple(names.replace("slots", "new_slots") for names in moment)
    operands = (moment, "g slots", "g slots", "g new_slots")
    call = grouped(launch, operands, (carried, "g new_slots"), partition.named_axes())

    def carry(*arrays) -> tuple[tuple[Array, ...], Array]:
        return jax.tree.map(lambda array: array[0], call(*jax.tree.map(lambda array: array[None], arrays)))

    def places(moments, _, __, new) -> Any:
        return tuple(joined(*spec_of(new), *spec_of(moment)[1:]) for moment in moments), joined(*spec_of(new))

    return portable(carry, places)(moments, steps, old, new)


def share_out(indices: Int32[Array, " n"], blocks: Blocks, devices: Sequence[int]) -> Int32[Array, " n"]:
    """Sorts block numbers by the device that owns them, and by number on each device.

    Args:
      indices: block numbers, of which every device owns equally many.
      blocks: the tensor's blocks.
      devices: over how many devices each dimension of the tensor is cut.
    """
    coordinates = jnp.unravel_index(indices, blocks.grid)
    owner = jnp.zeros_like(indices)
    for c, n, count in zip(coordinates, blocks.grid, devices, strict=True):
        owner = owner * count + c // math.ceil(n / count)
    return indices[jnp.lexsort((indices, owner))]
