"""The head: what makes logits, or losses, of the states after the final norm."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtune_kernels import linear_cross_entropy
from jaxtyping import Array, Float, Int32, UInt32

from jaxtune.models.linear import Adapter, linear
from jaxtune.parallel.sharding import RULES


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer onto the vocabulary, perhaps with an adapter, and the soft cap of its logits.

    Attributes:
        matrix: ``[d, vocab]``, or the embedding table ``[vocab, d]`` where it is tied.
        tied: Whether the matrix is the embedding table.
        soft_cap: Logits become ``soft_cap * tanh(logits / soft_cap)`` (Gemma 2); None means no cap.
        adapter: The head's adapter, or None.
        rows: Identity of each position, for the adapter's dropout.
        mesh: The mesh that the matrix lies on, or None.
    """

    matrix: Float[Array, "_ _"]
    tied: bool
    soft_cap: float | None = None
    adapter: Adapter | None = None
    rows: UInt32[Array, "b s"] | None = None
    mesh: jax.sharding.Mesh | None = None

    def logits(self, states: Float[Array, "b s d"]) -> Float[Array, "b s vocab"]:
        """Logits, float32."""
        if self.adapter is not None:
            logits = linear(states, self.matrix, None, self.adapter, self.rows).astype(jnp.float32)
        else:
            product = "bsd,vd->bsv" if self.tied else "bsd,dv->bsv"
            logits = jnp.einsum(product, states, self.matrix.astype(states.dtype), preferred_element_type=jnp.float32)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def losses(
        self,
        states: Float[Array, "b s d"],
        targets: Int32[Array, "b s"],
        weights: Float[Array, "b s"],
        *,
        label_smoothing: Float[Array, ""] | float = 0.0,
        z_loss: Float[Array, ""] | float = 0.0,
    ) -> Float[Array, "b s"]:
        """Cross-entropy of each position, float32, without ever holding the logits of all of them.

        Args:
            states: After the final norm.
            targets: Token that each position should predict.
            weights: Positions of weight 0 have the loss 0, and cost nothing; other weights are not multiplied in.
            label_smoothing: See :func:`jaxtune_kernels.linear_cross_entropy`.
            z_loss: See there.
        """
        low_rank = None
        if self.adapter is not None:
            low_rank = self.adapter.head_term(states, self.rows)
        return linear_cross_entropy(
            states,
            self.matrix,
            targets,
            weights,
            transposed=self.tied,
            low_rank=low_rank,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            soft_cap=self.soft_cap,
            mesh=self.mesh,
            row_axes=RULES["batch"],
            vocabulary_axis=RULES["vocab"][0],
            trial_axes=RULES["trials"],
        )
