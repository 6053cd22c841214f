"""LoRA-FA (arXiv:2308.03303): LoRA that trains B alone, with half the optimizer's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jaxtune.late import TYPES, jax, jnp
from jaxtune.updates.treatments.base import Arrays, Exported, Trained, Values
from jaxtune.updates.treatments.low_rank import LowRank, RankRule

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Bool, Float, Key

    from jaxtune.models.linear import Adapter

_RIDGE = 1e-8


class LoraFaRule(RankRule):
    """Linear layers that get a low-rank term of which B alone is trained (LoRA-FA, arXiv:2308.03303)."""

    method: Literal["lora_fa"] = Field(
        default="lora_fa", description="These linear layers get a low-rank term of which B alone is trained."
    )


class LoraFa(LowRank):
    """LoRA with a frozen A.

    The gradient of B is multiplied by ``(1/s²) (AᵀA)⁻¹`` of the columns in use, which makes the change of A B as near
    as it can be to that of training W. It comes before clipping; in PEFT's optimizer, after.
    """

    Section = LoraFaRule

    def arrays(self) -> Arrays:
        """B."""
        return {"b": super().arrays()["b"]}

    def fixed(self) -> Arrays:
        """A."""
        return {"a": super().arrays()["a"]}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """As LoRA's."""
        arrays, _ = super().init(key, base, values)
        return {"b": arrays["b"]}, {"a": arrays["a"]}

    def changed(
        self,
        term: Any,
        held: Mapping[str, Float[Array, "..."]],
        base: Mapping[str, Array],
        values: Values,
        on: Bool[Array, "*layers"] | None = None,
    ) -> Adapter:
        """Another gradient of B."""
        del held, base, values
        gram = jnp.einsum("...ir,...is->...rs", term.a, term.a)
        if on is not None:
            gram = jnp.where(on[..., None, None], jax.lax.stop_gradient(gram), jnp.eye(gram.shape[-1]))
        # Columns out of use are zero: a one in their place leaves the others' inverse as it is.
        unused = jnp.where(jnp.diagonal(gram, axis1=-2, axis2=-1) == 0, 1.0, _RIDGE)
        inverse = jnp.linalg.inv(gram + unused[..., None] * jnp.eye(gram.shape[-1]))
        factor = inverse / jnp.maximum(jnp.square(term.scale), 1e-16)[..., None, None]
        moved = factor @ term.b
        # B itself, whose gradient is multiplied.
        b = jax.lax.stop_gradient(term.b) + (moved - jax.lax.stop_gradient(moved))
        if on is not None:
            b = jnp.where(on[..., None, None], b, term.b)
        return type(term)(term.a, b, term.scale, term.dropout_rate, term.dropout_seed)

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The rows of B up to the rank."""
        for each in super().sizes(values):
            size = each.parameters * self.outputs // (self.inputs + self.outputs)
            yield dataclasses.replace(each, parameters=size)

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """As LoRA's."""
        yield from super().tensors({**arrays, **fixed}, {}, values)
