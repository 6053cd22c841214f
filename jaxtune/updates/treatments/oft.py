"""OFT (arXiv:2306.07280): the inputs of linear layers are rotated, block by block, by trained rotations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jaxtune.config.rule import RuleConfig
from jaxtune.errors import UserError
from jaxtune.late import TYPES, jnp, np
from jaxtune.updates.treatments.base import NO_RULE, Arrays, Effect, Exported, LinearTreatment, Values

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float, Key, UInt32

    from jaxtune.models.linear import AdaptedLayer

_TERMS = 5
"""Of the series, with that of the power 0."""
_SINCE = "0.18.0"
"""PEFT's series is this one from here on, and PEFT asks who wrote an adapter."""


class OftRule(RuleConfig):
    """Linear layers whose inputs get trained rotations, block by block (OFT, arXiv:2306.07280)."""

    method: Literal["oft"] = Field(
        default="oft", description="The inputs of these linear layers get trained rotations, block by block."
    )
    block_size: int = Field(
        default=32, ge=2, description="Size of a block, the inputs that are rotated together; it divides their number."
    )
    exact: bool = Field(
        default=False, description="Rotations are exact, by inverses, and not by a series of five terms (OFTv2)."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Oft(LinearTreatment):
    """``y = (x R) W + bias``, R block-diagonal; of each block the upper triangle of a skew Q is trained, from 0.

    R is Q's Cayley transform: ``(I − Q)(I + Q)⁻¹``, or the first terms of ``(I + Q)(I − Q)⁻¹``, which are
    ``I + 2Q + 2Q² + 2Q³ + Q⁴`` (arXiv:2506.19847); that Q has another sign in either is PEFT's way. The columns of
    ``R W`` have the lengths and angles of those of W.
    """

    Section = OftRule
    peft_type = "OFT"

    @property
    def block(self) -> int:
        """Inputs of a block; it is a shape, and all rules of a module say the same."""
        return self._first.block_size

    @property
    def _first(self) -> Any:
        return self.sections[self.used_rules[0]]

    @property
    def _shape(self) -> tuple[int, int]:
        return self.inputs // self.block, self.block * (self.block - 1) // 2

    def arrays(self) -> Arrays:
        """The triangles."""
        blocks, entries = self._shape
        return {"r": self.stacked((self.axes[0], blocks), (None, entries))}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Zeros: nothing is rotated."""
        del key, base, values
        return {"r": jnp.zeros(self.arrays()["r"].shape, jnp.float32)}, {}

    def apply(
        self,
        base: Mapping[str, Array],
        arrays: Arrays,
        fixed: Arrays,
        values: Values,
        seed: UInt32[Array, ""] | None,
    ) -> Effect:
        """Rotations before the product."""
        del base, fixed, values, seed
        from jaxtune.models.linear import ArraysAdapter

        product = _rotated_exactly if self._first.exact else _rotated
        return Effect(adapters={self.path: ArraysAdapter(product, arrays)})

    def check(self, values: Values) -> None:
        """Blocks divide the inputs, and are the same in all layers of a module."""
        del values
        for index in self.used_rules:
            rule: Any = self.sections[index]
            if (rule.block_size, rule.exact) != (self.block, self._first.exact):
                raise UserError(
                    f"{self.path}: update.{self.used_rules[0]} and update.{index} have other blocks (block_size "
                    f"{self.block} and {rule.block_size}, exact {self._first.exact} and {rule.exact}); all layers of a "
                    "module have the same"
                )
            if self.inputs % self.block:
                fits = [size for size in range(2, self.inputs + 1) if self.inputs % size == 0]
                nearest = min(fits, key=lambda size: abs(size - self.block))
                raise UserError(
                    f"update.{index}.block_size: {self.block} does not divide the {self.inputs} inputs of {self.path}; "
                    f"the nearest that does is {nearest}"
                )

    def flops(self, values: Values) -> dict[str, float]:
        """Of the rotations."""
        return {self.path: 2.0 * self.inputs * self.block * len(self.rules)}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """``oft_R.weight`` (blocks, entries), by rows of the triangle."""
        del fixed, values
        config = {
            "r": 0,
            "oft_block_size": self.block,
            "use_cayley_neumann": not self._first.exact,
            "num_cayley_neumann_terms": _TERMS,
            "module_dropout": 0.0,
            "coft": False,
            "block_share": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_weights": True,
            "peft_version": _SINCE,
        }
        for layer, index in enumerate(self.rules):
            if index != NO_RULE:
                triangles = arrays["r"][layer] if self.layered else arrays["r"]
                tensors = {"oft_R.weight": np.ascontiguousarray(triangles)}
                yield Exported(self.path, layer if self.layered else None, tensors, config)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """One of blocks of one size, each of its own, that are not held near the start."""
        version = re.findall(r"\d+", config.get("peft_version") or "0.0")[:2]
        ours = config.get("num_cayley_neumann_terms") == _TERMS and [*map(int, version)] >= [0, 18]
        other = config.get("use_cayley_neumann") and not ours
        return not (config.get("r") or config.get("coft") or config.get("block_share") or other)

    @classmethod
    def read_section(cls, config: Mapping[str, Any], module: str) -> dict[str, Any]:
        """The block."""
        del module
        return {"block_size": config["oft_block_size"], "exact": not config.get("use_cayley_neumann", False)}

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """The triangles; 0 where there are none."""
        triangles = np.zeros((len(self.rules), *self._shape), np.float32)
        for layer, held in tensors.items():
            triangles[layer] = held["oft_R.weight"]
        return {"r": self.of_layers(triangles)}, {}


def _skew(triangles: Float[Array, "blocks entries"], block: int) -> Float[Array, "blocks block block"]:
    rows, columns = np.triu_indices(block, 1)
    upper = jnp.zeros((len(triangles), block, block), triangles.dtype)
    upper = upper.at[:, rows, columns].set(triangles, unique_indices=True)
    return upper - upper.mT


def _rotated(layer: AdaptedLayer) -> Float[Array, "..."]:
    q = _blocks(layer)
    square = q @ q
    return _product(layer, 2.0 * (q + square + square @ q) + square @ square)


def _rotated_exactly(layer: AdaptedLayer) -> Float[Array, "..."]:
    q = _blocks(layer)
    return _product(layer, jnp.linalg.solve(jnp.eye(q.shape[-1]) - q, 2.0 * q).mT)


def _blocks(layer: AdaptedLayer) -> Float[Array, "blocks block block"]:
    triangles = layer.arrays["r"]
    return _skew(triangles, layer.frozen.x.shape[-1] // triangles.shape[0])


def _product(layer: AdaptedLayer, change: Float[Array, "blocks block block"]) -> Float[Array, "..."]:
    """With R − I: beside a one of a short dtype, small rotations would be lost."""
    from jaxtune.models.linear import kept

    x = layer.frozen.x
    blocks = x.reshape(*x.shape[:-1], *change.shape[:2])
    turned = blocks + jnp.einsum("...rk,rkc->...rc", blocks, change.astype(x.dtype))
    return kept(layer.frozen.biased(layer.frozen.product(turned.reshape(x.shape))))
