"""DoRA (arXiv:2402.09353): a low-rank term, and a trained size for each column of the weights that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jaxtune.late import TYPES, jax, jnp, np
from jaxtune.updates.treatments.base import NO_RULE, Arrays, Exported, Trained, Values
from jaxtune.updates.treatments.low_rank import LowRank, RankRule

if TYPE_CHECKING or TYPES:
    from jaxtyping import Array, Bool, Float, Key

    from jaxtune.models.linear import AdaptedLayer, Adapter


class DoraRule(RankRule):
    """Linear layers that get a low-rank term and a trained size of each column (DoRA, arXiv:2402.09353)."""

    method: Literal["dora"] = Field(
        default="dora", description="These linear layers get a low-rank term and a trained size of each column."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")

    @property
    def rooted(self) -> bool:
        """As the key says."""
        return self.use_rslora


class Dora(LowRank):
    """``y = c ∘ (x W + s · x A B) + bias`` with ``c = m / ‖W + s A B‖``: the norm is over the inputs, and a constant.

    m starts at ‖W‖. The norm is made of ‖W‖², which is kept, of WᵀA and of AᵀA, so that no array of the size of W is::

        ‖W + s A B‖² = ‖W‖² + 2 s Σ_r (WᵀA ∘ Bᵀ) + s² Bᵀ (AᵀA) B

    Dropout, where there is any, drops the inputs of the low-rank term alone; PEFT drops those of the whole change,
    which takes a second product with W.
    """

    Section = DoraRule
    serves_head = False
    stage = 2

    def arrays(self) -> Arrays:
        """A, B and the sizes."""
        return {**super().arrays(), "m": self.stacked((self.axes[1], self.outputs))}

    def fixed(self) -> Arrays:
        """The squared norm of each column of W."""
        return {"norm": self.stacked((self.axes[1], self.outputs))}

    def init(self, key: Key[Array, ""], base: Mapping[str, Array], values: Values) -> tuple[Arrays, Arrays]:
        """Of W, its norms are read."""
        from jaxtune.models.weight import summed_over_inputs

        arrays, _ = super().init(key, base, values)
        norm = summed_over_inputs(base, f"{self.path}.kernel", self.axes, _squared)
        return {**arrays, "m": jnp.sqrt(norm)}, {"norm": norm}

    def changed(
        self,
        term: Any,
        held: Mapping[str, Float[Array, "..."]],
        base: Mapping[str, Array],
        values: Values,
        on: Bool[Array, "*layers"] | None = None,
    ) -> Adapter:
        """The term, and the factor on each column."""
        from jaxtune.models.linear import ArraysAdapter
        from jaxtune.models.weight import summed_over_inputs

        # What another method has put beside A and B is zero where this one is used.
        plain = term if on is None else self.adapter(held, values, None)
        a, b, scale = jax.lax.stop_gradient((plain.a, plain.b, plain.scale[..., None]))
        across = summed_over_inputs(base, f"{self.path}.kernel", self.axes, _across, a)
        gram = jnp.einsum("...ir,...is->...rs", a, a)
        squared = held["norm"] + 2 * scale * jnp.sum(across * b, axis=-2)
        squared += jnp.square(scale) * jnp.sum(b * jnp.einsum("...rs,...so->...ro", gram, b), axis=-2)
        treated = self.of_layers(np.array([[index != NO_RULE] for index in self.rules]))
        if on is not None:
            treated = on[..., None]
            squared = jnp.where(treated, squared, 1.0)
        factor = jnp.where(treated, held["m"] / jnp.sqrt(squared), 1.0)
        return ArraysAdapter(_product, {"term": term, "factor": factor})

    def sizes(self, values: Values) -> Iterator[Trained]:
        """The low-rank term's, and a size for each output."""
        for each in super().sizes(values):
            layers = 1 if each.layers is None else len(each.layers)
            yield dataclasses.replace(each, parameters=each.parameters + self.outputs * layers)

    def tensors(self, arrays: Arrays, fixed: Arrays, values: Values) -> Iterator[Exported]:
        """A, B and ``lora_magnitude_vector``."""
        for each in super().tensors(arrays, fixed, values):
            size = arrays["m"] if each.layer is None else arrays["m"][each.layer]
            tensors = {**each.tensors, "lora_magnitude_vector": np.ascontiguousarray(size)}
            yield dataclasses.replace(each, tensors=tensors, config={**each.config, "use_dora": True})

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """A LoRA that says so."""
        return bool(config.get("use_dora"))

    def restored(self, tensors: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[Arrays, Arrays]:
        """With the sizes; where there are none, 1."""
        arrays, fixed = super().restored(tensors)
        sizes = np.ones((len(self.rules), self.outputs), np.float32)
        for layer, held in tensors.items():
            sizes[layer] = held["lora_magnitude_vector"]
        return {**arrays, "m": self.of_layers(sizes)}, fixed


def _squared(kernel: Float[Array, "*parts inputs outputs"]) -> Float[Array, "*parts outputs"]:
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)


def _across(
    kernel: Float[Array, "*parts inputs outputs"], a: Float[Array, "*parts inputs rank"]
) -> Float[Array, "*parts rank outputs"]:
    return jnp.einsum("...ir,...io->...ro", a.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


def _product(layer: AdaptedLayer) -> Float[Array, "..."]:
    # What is kept for the backward pass is what the size multiplies: its gradient needs that.
    y = layer.arrays["term"].product(layer.frozen._replace(bias=None))
    return layer.frozen.biased((y * layer.arrays["factor"]).astype(y.dtype))
