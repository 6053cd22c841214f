"""The definition of the masked update: what every other implementation is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune_kernels.masked_update.blocks import Blocks
from jaxtune_kernels.masked_update.operands import Operands, Results, slot_terms
from jaxtune_kernels.masked_update.rules import UpdateRule, updated


def masked_update_reference(rule: UpdateRule, blocks: Blocks, operands: Operands) -> Results:
    """Cuts the tensor into its blocks, moves the selected ones, and joins all of them again."""
    cut = jax.vmap(blocks.split)
    parts = cut(operands.params)
    trials = jnp.arange(parts.shape[0])[:, None]
    selected = (trials, operands.slots.blocks)
    grads = cut(operands.grads)[selected] if operands.whole_grads else operands.grads
    new, moments = updated(rule, parts[selected], grads, operands.moments, *slot_terms(operands))
    # What sticks out of the tensor belongs to no parameter, and a number behind the last block to no block.
    inside = blocks.split(jnp.ones(blocks.shape, bool))[operands.slots.blocks]
    exists = (operands.slots.blocks < blocks.count)[..., None, None]
    moments = tuple(
        jnp.where(exists, jnp.where(inside, new, 0), old) for new, old in zip(moments, operands.moments, strict=True)
    )
    return jax.vmap(blocks.join)(parts.at[selected].set(new)), moments
