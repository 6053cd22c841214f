"""IA3 (arXiv:2205.05638): a trained factor on each output, or each input, of linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jnp, np
from jaxtune.updates.treatments.base import NAME, NO_RULE, Arrays, Effect, Exported, LinearTreatment, Values

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Key, UInt32

    from jaxtune.models.linear import AdaptedLayer


class Ia3Rule(RuleConfig):
    """Linear layers whose outputs, or inputs, get trained factors (IA3, arXiv:2205.05638)."""

    method: Literal["ia3"] = Field(
        default="ia3", description="These linear layers get a trained factor on each output, or input."
    )
    side: Literal["auto", "output", "input"] = Field(
        default="auto", description="What is multiplied; auto is the input of layers.*.mlp.down, and outputs elsewhere."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Ia3(LinearTreatment):
    """``y = (x W + bias) ∘ l``, or ``y = (x ∘ l) W + bias``; l starts at 1."""

    Section = Ia3Rule
    peft_type = "IA3"

    @property
    def on_inputs(self) -> bool:
        """Whether the inputs are multiplied. All rules of a module say the same."""
        section: Any = self.sections[self.used_rules[0]]
        return section.side == "input" or (section.side == "auto" and self.path == "layers.mlp.down")

    def arrays(self) -> Arrays:
        """The factors."""
        side = 0 if self.on_inputs else 1
        return {"l": self.stacked((self.axes[side], (self.inputs, self.outputs)[side]))}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Ones."""
        del key, base, values
        return {"l": jnp.ones(self.arrays()["l"].shape, jnp.float32)}, {}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """Factors before the product, or behind it."""
        del base, fixed, values, seed
        from jaxtune.models.linear import ArraysAdapter

        product = _inputs_multiplied if self.on_inputs else _outputs_multiplied
        return Effect(adapters={self.path: ArraysAdapter(product, arrays)})

    def settled(self, index: int) -> dict[str, Any]:
        """The side."""
        del index
        return {"side": "input" if self.on_inputs else "output"}

    def check(self, values: Values) -> None:
        """All rules of a module multiply the same side."""
        del values
        sides = {rule: self.value(rule, "side", {}) for rule in self.sections}
        if len(set(sides.values())) > 1:
            told = ", ".join(f"update.{rule}.side {side}" for rule, side in sides.items())
            raise UserError(f"{self.path}: {told}; all layers of a module have one side")

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """``ia3_l``: (1, in) of inputs, (out, 1) of outputs."""
        del fixed, values
        for layer, index in enumerate(self.rules):
            if index != NO_RULE:
                factors = arrays["l"][layer] if self.layered else arrays["l"]
                factors = factors[None] if self.on_inputs else factors[:, None]
                config = {"feedforward_modules": [NAME] if self.on_inputs else []}
                tensors = {"ia3_l": np.ascontiguousarray(factors)}
                yield Exported(self.path, layer if self.layered else None, tensors, config)

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """The side."""
        from jaxtune.updates.peft.format import is_named

        return {"side": "input" if is_named(module, config["feedforward_modules"]) else "output"}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """The factors; 1 where there are none."""
        factors = np.ones((len(self.rules), self.inputs if self.on_inputs else self.outputs), np.float32)
        for layer, held in tensors.items():
            factors[layer] = held["ia3_l"].reshape(-1)
        return {"l": factors if self.layered else factors[0]}, {}


def _inputs_multiplied(layer: AdaptedLayer) -> Float[Array, "..."]:
    from jaxtune.models.linear import kept

    x = (layer.frozen.x * layer.arrays["l"]).astype(layer.frozen.x.dtype)
    return kept(layer.frozen.biased(layer.frozen.product(x)))


def _outputs_multiplied(layer: AdaptedLayer) -> Float[Array, "..."]:
    from jaxtune.models.linear import kept

    y = kept(layer.frozen.biased(layer.frozen.product()))
    return (y * layer.arrays["l"]).astype(y.dtype)
