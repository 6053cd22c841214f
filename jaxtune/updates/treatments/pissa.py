"""PiSSA (arXiv:2404.02948): a low-rank term that starts as the largest part of the weights, which the base loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jaxtune.errors import UserError
from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import Arrays, Exported, Values
from jaxtune.updates.treatments.low_rank import LowRank, RankRule

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Bool, Float, Key

    from jaxtune.models.linear import Adapter

_EXACT, _BEYOND, _ITERATIONS = 1024, 8, 4
"""Up to this side a matrix is decomposed whole; beyond, by so many columns more than are asked for, and iterations."""


class PissaRule(RankRule):
    """Linear layers whose largest singular part is trained as a low-rank term (PiSSA, arXiv:2404.02948)."""

    method: Literal["pissa"] = Field(
        default="pissa", description="The largest singular part of these linear layers is trained as a low-rank term."
    )


class FromWeights(LowRank):
    """A low-rank term that starts as a part A₀ B₀ of W and takes its place: ``y = x W + s · (x A B − x A₀ B₀) + bias``.

    W itself stays as it is, shared by whoever else has it, so that what is computed at the start is x W to the last bit
    but for the rounding of a difference that is zero. Both products are made as one of twice the rank, and so it is
    exported: a plain LoRA beside the base. Dropout drops the inputs of both.
    """

    stage = 1

    def part(self, kernel: Float[Array, "inputs outputs"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """A and B of a kernel, float32, with as many columns as there is room for, the most important first."""
        raise NotImplementedError

    def shared(self, values: Values) -> Float[Array, " layers"]:
        """What the start of each layer is divided by: its scale, or 1."""
        del values
        return jnp.ones(len(self.rules), jnp.float32)

    @property
    def whole(self) -> frozenset[str]:
        """The kernel, which is decomposed."""
        return frozenset({f"{self.path}.kernel"})

    def fixed(self) -> Arrays:
        """A and B of the start."""
        arrays = LowRank.arrays(self)
        return {"a0": arrays["a"], "b0": arrays["b"]}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Of each layer by itself, so that one kernel in float32 is there at a time."""
        del key
        kernel = base[f"{self.path}.kernel"]
        kernels = kernel if self.layered else kernel[None]
        a, b = jax.lax.map(lambda one: self.part(one.astype(jnp.float32)), kernels)
        root = jnp.sqrt(self.shared(values))[:, None, None]
        a, b = self.of_layers(a / root), self.of_layers(b / root)
        return {"a": a, "b": b}, {"a0": a, "b0": b}

    def changed(
        self,
        term: Any,
        held: Mapping[str, Float[Array, "..."]],
        base: Mapping[str, Array],
        values: Values,
        on: Bool[Array, "*layers"] | None = None,
    ) -> Adapter:
        """[A A₀] and [B; −B₀]: the difference of two terms, where A₀ and B₀ are not zero."""
        del base, on
        begun = self.adapter({"a": held["a0"], "b": held["b0"]}, values, None)
        a = jnp.concatenate([term.a, begun.a], axis=-1)
        b = jnp.concatenate([term.b, -begun.b], axis=-2)
        return type(term)(a, b, term.scale, term.dropout_rate, term.dropout_seed)

    def check(self, values: Values) -> None:
        """Every rank lies within the sides of the matrix, which has no more parts."""
        super().check(values)
        for index in self.used_rules:
            rank = int(self.value(index, "rank", values))
            if rank > (most := min(self.inputs, self.outputs)):
                raise UserError(
                    f"update.{index}.rank: {rank} is above the smaller side of {self.path}, {most}, and method "
                    f"{self.sections[index].method} starts from as many parts of it; lower it, or match other layers"
                )

    def flops(self, values: Values) -> dict[str, float]:
        """Of twice the rank."""
        return {path: 2.0 * count for path, count in super().flops(values).items()}

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """A plain LoRA of twice the rank, and of twice the alpha, or the root of it, so that the scale is the same."""
        starts = super().tensors({"a": fixed["a0"], "b": -fixed["b0"]}, {}, values)
        for now, begun in zip(super().tensors(arrays, {}, values), starts, strict=True):
            tensors = {
                name: np.concatenate([now.tensors[name], begun.tensors[name]], axis=axis)
                for name, axis in (("lora_A.weight", 0), ("lora_B.weight", 1))
            }
            alpha = now.config["lora_alpha"] * (2.0**0.5 if now.config["use_rslora"] else 2.0)
            config = {**now.config, "r": 2 * now.config["r"], "lora_alpha": alpha}
            yield dataclasses.replace(now, tensors=tensors, config=config)


class Pissa(FromWeights):
    """A₀ = U √(S/s) and B₀ = √(S/s) Vᵀ of the largest singular values S."""

    Section = PissaRule

    def shared(self, values: Values) -> Float[Array, " layers"]:
        """The scale; 1 where there is no rule."""
        scale = self.scale(values)
        return jnp.where(scale > 0, scale, 1.0)

    def part(self, kernel: Float[Array, "inputs outputs"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """By its singular values; of a large matrix, by those of its projection onto random columns."""
        wanted, most = self.capacity, min(kernel.shape)
        if most <= _EXACT:
            u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
        else:
            # Halko, Martinsson, Tropp (arXiv:0909.4061), algorithm 4.4.
            columns = jax.random.normal(jax.random.key(0), (kernel.shape[1], min(wanted + _BEYOND, most)))
            basis = jnp.linalg.qr(kernel @ columns)[0]
            for _ in range(_ITERATIONS):
                basis = jnp.linalg.qr(kernel @ jnp.linalg.qr(kernel.T @ basis)[0])[0]
            u, s, v = jnp.linalg.svd(basis.T @ kernel, full_matrices=False)
            u = basis @ u
        root, room = jnp.sqrt(s[:wanted]), max(0, wanted - most)
        a, b = u[:, :wanted] * root, root[:, None] * v[:wanted]
        return jnp.pad(a, ((0, 0), (0, room))), jnp.pad(b, ((0, room), (0, 0)))
