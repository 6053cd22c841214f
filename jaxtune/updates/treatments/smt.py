"""SMT (sparse matrix tuning, arXiv:2405.15525): of linear layers the blocks of the largest gradients are trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import PositiveInt
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import (
    Arrays,
    Effect,
    Group,
    LinearTreatment,
    Matched,
    Shape,
    Trained,
    Treatment,
    Values,
    largest_divisor,
)

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Int, Key, UInt32

    from jaxtune.models.linear import AdaptedLayer


class SmtRule(RuleConfig):
    """Linear layers of which the blocks of the largest gradients are trained (SMT, arXiv:2405.15525)."""

    method: Literal["smt"] = Field(
        default="smt", description="Of these linear layers the blocks of the largest gradients are trained."
    )
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.05, description="Share of the blocks of each module, in all its layers together, that are trained."
    )
    block_size: PositiveInt = Field(
        default=256, description="Rows and columns of a block; it divides inputs and outputs."
    )
    rho: float = Field(
        default=2.0,
        ge=1.0,
        description="Most blocks of a layer, as a factor on their mean; others then have fewer. 1 moves none.",
    )
    batches: PositiveInt = Field(
        default=8, description="Blocks are chosen by the batches of so many steps, the first ones of training."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Smt(LinearTreatment):
    """``y = x W + bias`` and, for each chosen block, its inputs times D added to its outputs; D starts at 0.

    The blocks are those of the largest mean |dW| over the first batches, at most ``rho`` times the mean in a layer:
    chosen among all layers of one module (in the paper, of all modules together), as so many arrays of a module's
    blocks are shapes of the program. They stay as chosen.

    What is trained is a difference: W stays whole and shared, codes too, and small steps are not lost in a short dtype.
    Weight decay pulls it towards the weights that the run began with.
    """

    Section = SmtRule
    observed = "gradients"

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """One for each module.

        Raises:
          UserError: blocks do not divide a module, or are larger; its rules differ in their size; a share has no block.
        """
        for part in super().treat(arrays, sections, capacity):
            assert isinstance(part, Smt)
            first = part.used_rules[0]
            for index in part.used_rules:
                part._check_blocks(index)
                if (size := part._rule(index).block_size) != part.block:
                    raise UserError(
                        f"update.{index}.block_size: {size} for layers of {part.path}, of which update.{first} says "
                        f"{part.block}; all layers of a module have blocks of one size"
                    )
            for index, layers in part.layers_by_rule():
                total = len(layers) * part.blocks
                if not part.counts[index]:
                    raise UserError(
                        f"update.{index}.share: {part._rule(index).share:g} of the {total} blocks of {part.path} "
                        f"selects nothing; give at least {math.ceil(1000 / total) / 1000:g}, or a smaller block_size"
                    )
            yield part

    def _check_blocks(self, index: int) -> None:
        size, shared = self._rule(index).block_size, math.gcd(self.inputs, self.outputs)
        if shared % size:
            said = "is larger than" if size > min(self.inputs, self.outputs) else "does not divide"
            raise UserError(
                f"update.{index}.block_size: {size} {said} {self.path} ({self.inputs} x {self.outputs}); the nearest "
                f"below that divides both sides is {largest_divisor(shared, size)}"
            )

    def _rule(self, index: int) -> SmtRule:
        section = self.sections[index]
        assert isinstance(section, SmtRule)
        return section

    @property
    def block(self) -> int:
        """Rows and columns of a block."""
        return self._rule(self.used_rules[0]).block_size

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of a layer: along the inputs, along the outputs."""
        return self.inputs // self.block, self.outputs // self.block

    @property
    def blocks(self) -> int:
        """Blocks of a layer."""
        return math.prod(self.grid)

    @property
    def counts(self) -> dict[int, int]:
        """How many blocks each rule trains, in its layers together."""
        return {
            rule: math.floor(self._rule(rule).share * len(layers) * self.blocks + 0.5)
            for rule, layers in self.layers_by_rule()
        }

    @property
    def most(self) -> dict[int, int]:
        """How many blocks of a layer each rule may train."""
        found = {}
        for rule, layers in self.layers_by_rule():
            count = self.counts[rule]
            # A mean that is a whole number but for its last bits is that number.
            mean = math.ceil(self._rule(rule).rho * count / len(layers) - 1e-9)
            found[rule] = min(self.blocks, count, mean)
        return found

    def arrays(self) -> Arrays:
        """D of the blocks, by rule and then by layer."""
        return {"d": Shape((sum(self.counts.values()), self.block, self.block), (None, None, None))}

    def fixed(self) -> Arrays:
        """Of each block its layer, and its place there: row by row of the grid."""
        shape = Shape((sum(self.counts.values()),), (None,), "int32")
        return {"layers": shape, "places": shape}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """D at zero; before anything is known of gradients, the first blocks of each layer."""
        del key, base, values
        chosen = self.chosen(np.tile(-np.arange(self.blocks, dtype=np.float64), (len(self.rules), 1)))
        return {"d": jnp.zeros(self.arrays()["d"].shape, jnp.float32)}, {
            name: jnp.asarray(held) for name, held in chosen.items()
        }

    def chosen(self, scores: Float[np.ndarray, "layers blocks"]) -> dict[str, Int[np.ndarray, " chosen"]]:
        """The blocks of the largest scores, as :meth:`fixed` has them."""
        layers, places = [], []
        for rule, own in self.layers_by_rule():
            most = self.most[rule]
            order = np.argsort(-scores[list(own)], axis=1, kind="stable")[:, :most]
            best = np.take_along_axis(scores[list(own)], order, axis=1).reshape(-1)
            taken = np.sort(np.argsort(-best, kind="stable")[: self.counts[rule]])
            layers.append(np.array(own)[taken // most])
            places.append(order.reshape(-1)[taken])
        return {
            "layers": np.concatenate(layers).astype(np.int32),
            "places": np.concatenate(places).astype(np.int32),
        }

    @property
    def observed_batches(self) -> int:
        """The most that a rule asks for."""
        return max(self._rule(rule).batches for rule in self.used_rules)

    def of_gradient(self, gradient: Float[Array, "inputs outputs"]) -> Float[Array, " blocks"]:
        """The mean |dW| of each block."""
        rows, columns = self.grid
        cut = jnp.abs(gradient).reshape(rows, self.block, columns, self.block)
        return jnp.mean(cut, axis=(1, 3)).reshape(-1)

    def observe(self, seen: np.ndarray, learned: Any) -> Float[np.ndarray, "layers blocks"]:
        """The sum over the batches."""
        return np.asarray(seen, np.float64) + (0.0 if learned is None else learned)

    @classmethod
    def informed(cls, parts: Mapping[str, Any], learned: Mapping[str, Any]) -> dict[str, tuple[Arrays, Arrays]]:
        """D at zero, and the blocks of the largest gradients."""
        if not any(np.any(scores) for scores in learned.values()):
            raise UserError(
                "update: method smt chooses blocks by gradients in the first batches, and all are 0: no loss counts in "
                "them"
            )
        return {
            path: ({"d": np.zeros(part.arrays()["d"].shape, np.float32)}, part.chosen(learned[path]))
            for path, part in parts.items()
        }

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """D beside the layer's own product: every layer looks at as many blocks, from its first one on."""
        del base, values, seed
        from jaxtune.models.linear import ArraysAdapter

        layers, most = fixed["layers"], max(self.most.values())
        numbers = jnp.arange(len(self.rules), dtype=layers.dtype)
        first = jnp.argmax(layers == numbers[:, None], axis=1).astype(jnp.int32)
        start = jnp.minimum(first, len(layers) - most)
        looked_at = start[:, None] + jnp.arange(most, dtype=jnp.int32)
        own = layers[looked_at] == numbers[:, None]
        of_layer = {"start": start, "own": own, "places": fixed["places"][looked_at]}
        each = {name: self.of_layers(array) for name, array in of_layer.items()}
        return Effect(adapters={self.path: ArraysAdapter(_product, each, {"d": arrays["d"]})})

    def groups(self) -> Arrays:
        """Each rule's blocks."""
        found: dict[int, tuple[int, ...] | None] = {}
        start = 0
        for rule, count in self.counts.items():
            found[rule] = tuple(range(start, start := start + count))
        return {"d": Group(dict.fromkeys(found) if len(found) == 1 else found)}

    def entries(self, fixed: Arrays) -> tuple[Sequence[int] | Int[Array, " entries"], Sequence[int]]:
        """The layers of the blocks."""
        return fixed["layers"], [rule for rule, count in self.counts.items() for _ in range(count)]

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The weights of the blocks, which are the model's own."""
        del values
        for rule, layers in self.layers_by_rule():
            count = self.counts[rule]
            told = f"smt {count} of {len(layers) * self.blocks}"
            yield Trained(rule, self.path, layers, count * self.block**2, told, added=False)

    def flops(self, values: Values) -> dict[str, float]:
        """Of the blocks that each layer looks at, and of bringing inputs and outputs to their places."""
        del values
        each = 2.0 * max(self.most.values()) * self.block * (self.block + sum(self.grid))
        return {self.path: each * len(self.rules)}


def _product(layer: AdaptedLayer) -> Float[Array, "..."]:
    from jaxtune.models.linear import kept

    frozen, of_layer = layer.frozen, layer.arrays
    size, most = layer.whole["d"].shape[-1], of_layer["places"].shape[-1]
    y = frozen.product()
    d = jax.lax.dynamic_slice_in_dim(layer.whole["d"], of_layer["start"], most)
    d = jnp.where(of_layer["own"][:, None, None], d, 0.0)
    # What was gathered is not kept for the backward pass: it may be wider than the inputs.
    term = jax.checkpoint(_term, prevent_cse=False, static_argnums=(3,))
    return kept(frozen.biased(y + term(frozen.x, d, of_layer["places"], y.shape[-1] // size)))


def _term(
    x: Float[Array, "*rows inputs"], d: Float[Array, "most block block"], places: Int[Array, " most"], columns: int
) -> Float[Array, "*rows outputs"]:
    """Products with zeros and ones in place of gathers: blocks share rows and columns, and sums over these, in the
    backward pass too, then have an order of their own on every device."""
    size = d.shape[-1]
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    rows = _picking(places // columns, parts.shape[-2], x.dtype)
    taken = jnp.einsum("...ib,ni->...nb", parts, rows)
    made = jnp.einsum("...nb,nbc->...nc", taken, d.astype(x.dtype))
    put = jnp.einsum("...nc,no->...oc", made, _picking(places % columns, columns, x.dtype))
    return put.reshape(*x.shape[:-1], columns * size)


def _picking(indices: Int[Array, " most"], size: int, dtype: Any) -> Float[Array, "most size"]:
    return (indices[:, None] == jnp.arange(size)).astype(dtype)
