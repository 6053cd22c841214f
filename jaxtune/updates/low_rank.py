"""The low-rank treatment of one linear module: its arrays, its start, and the adapter that the model is given.

A module's adapter is one stack over all layers, whatever rules its layers match. Rank, alpha and dropout are vectors
over the layers, gathered from the hyperparameters; a layer's rank is a mask over the columns of A up to the capacity,
so that another rank is another number and not another program. A masked column of A gives nothing, and gives its row of
B no gradient.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtune_kernels import hash_words
from jaxtyping import Array, Float, Key, UInt32

from jaxtune.config.update_rules import LowRankRule, Rule
from jaxtune.models.linear import LowRankAdapter

Hyperparameters = Mapping[str, Float[Array, ""] | float | int]
"""Numbers by dotted configuration key, ``update.0.rank``; a rule's own value stands for a key that is missing."""

NO_RULE = -1
"""In place of a rule's index: the layer is left alone."""


def rule_value(
    rules: Sequence[Rule], index: int, name: str, hyperparameters: Hyperparameters
) -> Float[Array, ""] | float | int:
    """A number of one rule: traced where the hyperparameters hold it, else as configured.

    A weight decay that the rule leaves open is the optimizer's.
    """
    value = hyperparameters.get(f"update.{index}.{name}", getattr(rules[index], name))
    return hyperparameters[f"optimizer.{name}"] if value is None else value


def rule_layers(rules: Sequence[int]) -> dict[int, tuple[int, ...] | None]:
    """The layers of each rule, given the rule of each layer; None in place of all layers."""
    found = {rule: tuple(i for i, other in enumerate(rules) if other == rule) for rule in sorted(set(rules))}
    found.pop(NO_RULE, None)
    return {rule: None if len(layers) == len(rules) else layers for rule, layers in found.items()}


def per_layer(values: Mapping[int, Float[Array, ""] | float | int], layers: Sequence[int]) -> Float[Array, " layers"]:
    """The values of the rules that the layers match, as a vector; 0 where a layer matches none."""
    order = sorted(values)
    table = jnp.stack([*(jnp.asarray(values[rule], jnp.float32) for rule in order), jnp.float32(0.0)])
    return table[np.array([order.index(rule) if rule != NO_RULE else len(order) for rule in layers])]


@dataclasses.dataclass(frozen=True)
class LowRankModule:
    """A linear module with a low-rank term.

    Attributes:
      path: of the module, ``layers.attention.q``; stacked over the layers unless it is ``lm_head``.
      inputs: width of the input.
      outputs: width of the output.
      axes: logical axes of input and output.
      rules: the index of each layer's rule, :data:`NO_RULE` for layers without one; a single entry if not stacked.
      capacity: the largest rank that there is room for.
    """

    path: str
    inputs: int
    outputs: int
    axes: tuple[str | None, str | None]
    rules: tuple[int, ...]
    capacity: int

    @property
    def stacked(self) -> bool:
        """Whether the arrays have a leading layer axis."""
        return self.path.startswith("layers.")

    @property
    def used_rules(self) -> tuple[int, ...]:
        """The rules that at least one layer matches."""
        return tuple(sorted(set(self.rules) - {NO_RULE}))

    def init(self, key: Key[Array, ""]) -> dict[str, Float[Array, "..."]]:
        """A and B at the start: B is zero, A is uniform in ±1 / sqrt(inputs), which is what PEFT draws.

        A column's values depend on the key, the module, the layer and the column alone: a larger capacity adds columns
        and changes none.
        """
        bound = 1.0 / math.sqrt(self.inputs)
        own = jax.random.fold_in(key, zlib.crc32(self.path.encode()))

        def column(layer: Array, index: Array) -> Array:
            draw = jax.random.fold_in(jax.random.fold_in(own, layer), index)
            return jax.random.uniform(draw, (self.inputs,), jnp.float32, -bound, bound)

        columns = jax.vmap(column, in_axes=(None, 0), out_axes=1)
        a = jax.vmap(columns, in_axes=(0, None))(jnp.arange(len(self.rules)), jnp.arange(self.capacity))
        b = jnp.zeros((len(self.rules), self.capacity, self.outputs), jnp.float32)
        return {"a": a, "b": b} if self.stacked else {"a": a[0], "b": b[0]}

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of A and B, for sharding."""
        layers = ("layers",) if self.stacked else ()
        return {"a": (*layers, self.axes[0], "rank"), "b": (*layers, "rank", self.axes[1])}

    def gathered(self, rules: Sequence[Rule], name: str, hyperparameters: Hyperparameters) -> Float[Array, " layers"]:
        """One number of the rules (``rank``, ``learning_rate_scale``, …) for each layer; 0 where there is no rule."""
        return per_layer({i: rule_value(rules, i, name, hyperparameters) for i in self.used_rules}, self.rules)

    def scale(self, rules: Sequence[Rule], hyperparameters: Hyperparameters) -> Float[Array, " layers"]:
        """The factor on A B for each layer: alpha / rank, or alpha / sqrt(rank); 0 where there is no rule."""
        rank = jnp.maximum(self.gathered(rules, "rank", hyperparameters), 1.0)
        rooted = np.array([index != NO_RULE and uses_rslora(rules[index]) for index in self.rules])
        return self.gathered(rules, "alpha", hyperparameters) / jnp.where(rooted, jnp.sqrt(rank), rank)

    def adapter(
        self,
        arrays: Mapping[str, Float[Array, "..."]],
        rules: Sequence[Rule],
        hyperparameters: Hyperparameters,
        dropout_seed: UInt32[Array, ""] | None,
    ) -> LowRankAdapter:
        """What the model is given: masked A, B, scale, and dropout where there is a seed.

        Each layer of each module draws with a seed of its own.
        """
        rank = self.gathered(rules, "rank", hyperparameters)
        active = jnp.arange(self.capacity) < rank[:, None, None]
        scale = self.scale(rules, hyperparameters)
        rate = seed = None
        if dropout_seed is not None:
            rate = self.gathered(rules, "dropout", hyperparameters)
            layers = jnp.arange(len(self.rules), dtype=jnp.uint32)
            seed = hash_words(dropout_seed, zlib.crc32(self.path.encode()), layers)
        if self.stacked:
            return LowRankAdapter(arrays["a"] * active, arrays["b"], scale, rate, seed)
        rate, seed = (None if value is None else value[0] for value in (rate, seed))
        return LowRankAdapter(arrays["a"] * active[0], arrays["b"], scale[0], rate, seed)

    def ranks(self, rules: Sequence[Rule], hyperparameters: Hyperparameters) -> tuple[int, ...]:
        """The rank in use in each layer, on the host; 0 where there is no rule."""
        return tuple(
            0 if index == NO_RULE else int(rule_value(rules, index, "rank", hyperparameters)) for index in self.rules
        )


def uses_rslora(rule: Rule) -> bool:
    """Whether a rule scales by the root of the rank (arXiv:2312.03732)."""
    return isinstance(rule, LowRankRule) and rule.use_rslora
