"""OLoRA (arXiv:2406.01775): a low-rank term that starts from an orthonormal basis of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from jaxtune.late import TYPES, jnp
from jaxtune.updates.treatments.low_rank import RankRule
from jaxtune.updates.treatments.pissa import FromWeights

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Float


class OloraRule(RankRule):
    """Linear layers that get a low-rank term which starts from a QR decomposition (OLoRA, arXiv:2406.01775)."""

    method: Literal["olora"] = Field(
        default="olora", description="These linear layers get a low-rank term that starts from their QR decomposition."
    )


class Olora(FromWeights):
    """Of Wᵀ = Q R: B₀ the first columns of Q, transposed, and A₀ the first rows of R, transposed."""

    Section = OloraRule

    def part(self, kernel: Float[Array, "inputs outputs"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """As many as there is room for."""
        q, r = jnp.linalg.qr(kernel.T)
        room = max(0, self.capacity - min(kernel.shape))
        a, b = r[: self.capacity].T, q[:, : self.capacity].T
        return jnp.pad(a, ((0, 0), (0, room))), jnp.pad(b, ((0, room), (0, 0)))
