"""S2FT (arXiv:2412.06289): what few channels of a layer's input, or output, have of its weights is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.config.section import PositiveInt, Traced
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import (
    NO_RULE,
    Arrays,
    Effect,
    Exported,
    Matched,
    Shape,
    Trained,
    Treatment,
    Values,
    largest_divisor,
)
from jaxtune.updates.treatments.low_rank import LowRank

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Int, Key, UInt32

    from jaxtune.models.linear import AdaptedLayer


class S2ftRule(RuleConfig):
    """Linear layers of which the weights of few channels are trained (S2FT, arXiv:2412.06289)."""

    method: Literal["s2ft"] = Field(
        default="s2ft", description="Of these linear layers the weights of few channels are trained."
    )
    rank: Annotated[PositiveInt, Traced(capacity=True)] = Field(
        default=64, description="Number of channels: rows of W, or columns."
    )
    side: Literal["auto", "input", "output"] = Field(
        default="auto",
        description="Whose channels; auto is the input of layers.*.attention.o and layers.*.mlp.down, else the output.",
    )
    block: PositiveInt = Field(
        default=1, description="Channels are drawn in runs of so many neighbours: the size of a head draws heads."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class S2ft(LowRank):
    """``y = x W + x[idx] D + bias``, or ``x D`` added to ``y[idx]``: D starts at 0, and the channels stay as drawn.

    The channels are gathered from the input, so that W stays shared and in its place; the paper moves them to the front
    of W. Of a smaller rank the channels are the first ones of a larger one.
    """

    Section = S2ftRule
    serves_head = False

    @classmethod
    def treat(
        cls, arrays: Sequence[Matched], sections: Mapping[int, RuleConfig], capacity: Mapping[str, int]
    ) -> Iterator[Treatment]:
        """One for each module.

        Raises:
          UserError: a module has fewer channels, or blocks do not divide them; or its rules differ in side or block.
        """
        for part in super().treat(arrays, sections, capacity):
            assert isinstance(part, S2ft)
            index, width = part.used_rules[0], part.width
            if part.capacity > width:
                raise UserError(
                    f"update.{index}.rank: {part.capacity} is above the {width} channels of {part.path}; give at most "
                    f"{width}"
                )
            block = part._section.block
            if width % block:
                raise UserError(
                    f"update.{index}.block: {block} does not divide the {width} channels of {part.path}; the nearest "
                    f"below that does is {largest_divisor(width, block)}"
                )
            for other in part.used_rules[1:]:
                if part._told(other) != part._told(index):
                    raise UserError(
                        f"update.{other}: {part._told(other)} for layers of {part.path}, of which update.{index} says "
                        f"{part._told(index)}; all layers of a module have one side and one block"
                    )
            yield part

    @property
    def _section(self) -> S2ftRule:
        section = self.sections[self.used_rules[0]]
        assert isinstance(section, S2ftRule)
        return section

    def _told(self, index: int) -> str:
        section: Any = self.sections[index]
        return f"side {section.side} and block {section.block}"

    @property
    def on_inputs(self) -> bool:
        """Whether the channels are those of the input."""
        side = self._section.side
        return side == "input" or (side == "auto" and self.path in ("layers.attention.o", "layers.mlp.down"))

    @property
    def width(self) -> int:
        """How many channels there are to draw from."""
        return self.inputs if self.on_inputs else self.outputs

    def arrays(self) -> Arrays:
        """D: (channels, outputs) or (inputs, channels)."""
        rank = ("rank", self.capacity)
        dims = (rank, (self.axes[1], self.outputs)) if self.on_inputs else ((self.axes[0], self.inputs), rank)
        return {"d": self.stacked(*dims)}

    def fixed(self) -> Arrays:
        """Which channels."""
        shape = self.stacked((None, self.capacity))
        return {"channels": Shape(shape.shape, shape.axes, "int32")}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """D at zero; channels by what names the layer."""
        del base, values
        block = self._section.block

        def draw(one: Key[Array, ""]) -> Int[Array, " width"]:
            first = jax.random.permutation(one, self.width // block) * block
            return (first[:, None] + jnp.arange(block)).reshape(-1)

        channels = self.drawn(key, 1, draw)[..., : self.capacity, 0].astype(jnp.int32)
        return {"d": jnp.zeros(self.arrays()["d"].shape, jnp.float32)}, {"channels": channels}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """D of the channels in use beside the layer's own product."""
        del base, seed
        from jaxtune.models.linear import ArraysAdapter

        used = self.of_layers(jnp.arange(self.capacity) < self.gathered("rank", values)[:, None])
        d = arrays["d"] * (used[..., None] if self.on_inputs else used[..., None, :])
        product = _of_inputs if self.on_inputs else _of_outputs
        return Effect(adapters={self.path: ArraysAdapter(product, {"d": d, "channels": fixed["channels"]})})

    def settled(self, index: int) -> dict[str, Any]:
        """The number of channels, the side and the block."""
        section: Any = self.sections[index]
        return {"rank": section.rank, "side": "input" if self.on_inputs else "output", "block": section.block}

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The weights of the channels in use."""
        for each in super().sizes(values):
            other = self.outputs if self.on_inputs else self.inputs
            yield dataclasses.replace(each, parameters=each.parameters * other // (self.inputs + self.outputs))

    def flops(self, values: Values) -> dict[str, float]:
        """Of the product with D."""
        return {self.path: 2.0 * sum(self.ranks(values)) * (self.outputs if self.on_inputs else self.inputs)}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """A LoRA: of zeros and ones, which takes or puts the channels, and D."""
        for layer, index in enumerate(self.rules):
            if index == NO_RULE:
                continue
            rank = int(self.value(index, "rank", values))
            d, channels = (each[layer] if self.layered else each for each in (arrays["d"], fixed["channels"]))
            places = np.zeros((rank, self.width), np.float32)
            places[np.arange(rank), channels[:rank]] = 1.0
            a, b = (places, d[:rank].T) if self.on_inputs else (d[:, :rank].T, places.T)
            tensors = {"lora_A.weight": np.ascontiguousarray(a), "lora_B.weight": np.ascontiguousarray(b)}
            config = {"r": rank, "lora_alpha": float(rank), "lora_dropout": 0.0, "use_rslora": False}
            yield Exported(self.path, layer if self.layered else None, tensors, config)


def _of_inputs(layer: AdaptedLayer) -> Float[Array, "..."]:
    from jaxtune.models.linear import kept

    frozen = layer.frozen
    taken = jnp.take(frozen.x, layer.arrays["channels"], axis=-1)
    return kept(frozen.biased(frozen.product() + jnp.dot(taken, layer.arrays["d"].astype(taken.dtype))))


def _of_outputs(layer: AdaptedLayer) -> Float[Array, "..."]:
    from jaxtune.models.linear import kept

    frozen = layer.frozen
    added = jnp.dot(frozen.x, layer.arrays["d"].astype(frozen.x.dtype))
    y = frozen.product().at[..., layer.arrays["channels"]].add(added, unique_indices=True)
    return kept(frozen.biased(y))
