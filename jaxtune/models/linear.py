"""The linear layer, with or without a low-rank adapter beside its frozen kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtune_kernels import Quantized, keep_mask, low_rank_matmul, quantized_matmul
from jaxtyping import Array, Float, Int32, UInt32

KERNELS = ("auto", "xla", "pallas", "interpret")
"""What computes a product with an adapter: the best by platform and shape, XLA, the platform's Pallas kernel, or
that of TPUs in an interpreter (for tests: very slow)."""

PROJECTION = "projection"
"""Name, for remat policies, of a linear layer's result."""


class FrozenLayer(NamedTuple):
    """A linear layer whose weights stay as they are, and what it is given: an adapter makes the result of it.

    Attributes:
        x: Input, in the compute dtype.
        kernel: W, (in, out), perhaps of few bits.
        bias: Added to the result, or None.
        rows: An identity for each row of x, from which dropout is drawn; by default its index.
        kernels: One of :data:`KERNELS`, for products that there is a kernel of.
        axes: Mesh axes that ``rows``, ``inputs`` and ``outputs`` are cut over.
    """

    x: Float[Array, "*rows inputs"]
    kernel: Float[Array, "inputs outputs"] | Quantized
    bias: Float[Array, " outputs"] | None = None
    rows: UInt32[Array, "*rows"] | None = None
    kernels: str = "auto"
    axes: Mapping[Any, Sequence[str]] | None = None

    def product(self, x: Float[Array, "*rows inputs"] | None = None) -> Float[Array, "*rows outputs"]:
        """``x W``, without the bias, of the layer's own input or of another one."""
        x = self.x if x is None else x
        if isinstance(self.kernel, Quantized):
            return quantized_matmul(x, self.kernel)
        # No float32 result type for a bfloat16 matmul: every backend sums in float32 anyway, and asking for the result
        # in float32 would make the gradient's matmuls mix float32 with bfloat16.
        return jnp.dot(x, self.kernel.astype(x.dtype))

    def biased(self, y: Float[Array, "*rows outputs"]) -> Float[Array, "*rows outputs"]:
        """``y + bias``."""
        return y if self.bias is None else y + self.bias.astype(y.dtype)


class Adapter:
    """What changes the result of a linear layer: a pytree of what one module has in one layer, or in all of them.

    In a stack every array, scalars too, has the layer axis first and is scanned beside the weights; but for those that
    are ``whole``, which every layer is given as they are.
    """

    def product(self, layer: FrozenLayer) -> Float[Array, "*rows outputs"]:
        """The layer's result, in the input's dtype; :func:`kept` names what the backward pass needs of it."""
        raise NotImplementedError

    def head_term(
        self, states: Float[Array, "*rows inputs"], rows: UInt32[Array, "*rows"] | None
    ) -> tuple[Float[Array, "*rows rank"], Float[Array, "rank outputs"]]:
        """Two factors of what is added to the head's result, whose own product is made elsewhere."""
        raise NotImplementedError(f"{type(self).__name__} does not serve the head")

    def embedded(
        self,
        x: Float[Array, "b s d"],
        tokens: Int32[Array, "b s"],
        positions: Int32[Array, "b s"],
        factor: float | None,
    ) -> Float[Array, "b s d"]:
        """What the layers are given.

        Args:
            x: Rows of the table, in the compute dtype.
            tokens: Whose rows they are.
            positions: Of each token in its own document.
            factor: Of the family on embeddings, or None.
        """
        raise NotImplementedError(f"{type(self).__name__} does not serve the embedding table")

    @property
    def virtual_tokens(self) -> int:
        """So many positions in front of each document are its own."""
        return 0

    def misfit(self, layers: tuple[int, ...], inputs: int, outputs: int) -> str | None:
        """What does not fit a module, of so many layers if it is stacked; None where nothing is known to be wrong."""
        del layers, inputs, outputs
        return None

    def unscanned(self) -> Any:
        """What is whole; None for nothing."""
        return None

    def scanned(self) -> Adapter:
        """Without what is whole."""
        return self

    def joined(self, whole: Any) -> Adapter:
        """With it again."""
        del whole
        return self

    def batch_axes(self, axis: int) -> Any:
        """Where the arrays of a stack of adapters have its axis, if that is behind the layers' where they have one."""
        return axis

    def merged(
        self, kernel: Float[Array, "inputs outputs"], bias: Float[Array, " outputs"] | None
    ) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"] | None]:
        """The weights, float32, of a plain layer with the same result: of one layer, without dropout.

        By default they are what it makes of the rows of the identity, less what it makes of nothing.

        Args:
            kernel: Of the layer, float32.
            bias: Of the layer, float32.
        """
        with jax.default_matmul_precision("highest"):
            nothing, each = (
                self.product(FrozenLayer(x, kernel, bias))
                for x in (jnp.zeros((1, kernel.shape[0])), jnp.eye(kernel.shape[0]))
            )
        return each - nothing, None if bias is None else nothing[0]


@dataclasses.dataclass(frozen=True, init=False)
class LowRankAdapter(Adapter):
    """A low-rank update of one module, ``scale · A B`` (LoRA, arXiv:2106.09685), or of one module in all layers.

    A pytree. In a stack every array, the scalars too, has the layer axis first and is scanned beside the weights.

    Attributes:
        a: A, float32; a rank that is masked out has a column of zeros here.
        b: B, float32.
        scale: Factor on the product: alpha / rank, or alpha / sqrt(rank).
        dropout_rate: Probability with which an entry of the input is dropped before A, or None for no dropout.
        dropout_seed: Names the draw, another one in each module and layer; None without dropout.
    """

    a: Float[Array, "*layers inputs rank"]
    b: Float[Array, "*layers rank outputs"]
    scale: Float[Array, "*layers"]
    dropout_rate: Float[Array, "*layers"] | None
    dropout_seed: UInt32[Array, "*layers"] | None

    # Leaves are not annotated: jax also builds this tree with shapes, shardings, axes or placeholders for leaves.
    def __init__(self, a: Any, b: Any, scale: Any, dropout_rate: Any = None, dropout_seed: Any = None) -> None:
        for name, value in (
            ("a", a),
            ("b", b),
            ("scale", scale),
            ("dropout_rate", dropout_rate),
            ("dropout_seed", dropout_seed),
        ):
            object.__setattr__(self, name, value)

    def product(self, layer: FrozenLayer) -> Float[Array, "*rows outputs"]:
        """``x W + bias + scale · (dropout(x) A) B``."""
        y = low_rank_matmul(
            layer.x,
            layer.kernel if isinstance(layer.kernel, Quantized) else layer.kernel.astype(layer.x.dtype),
            self.a,
            self.b,
            self.scale,
            bias=layer.bias,
            dropout_rate=self.dropout_rate,
            dropout_seed=self.dropout_seed,
            rows=layer.rows,
            implementation=None if layer.kernels == "auto" else layer.kernels,
            axes=layer.axes,
        )
        return kept(y)

    def head_term(
        self, states: Float[Array, "*rows inputs"], rows: UInt32[Array, "*rows"] | None
    ) -> tuple[Float[Array, "*rows rank"], Float[Array, "rank outputs"]]:
        """``scale · dropout(x) A`` and B."""
        return low_rank_states(states, self, rows), self.b

    def embedded(
        self,
        x: Float[Array, "b s d"],
        tokens: Int32[Array, "b s"],
        positions: Int32[Array, "b s"],
        factor: float | None,
    ) -> Float[Array, "b s d"]:
        """``(x + scale · A[tokens] B) · factor``, without dropout; as elsewhere, a token that is none gives NaN."""
        del positions
        rows = jnp.take(self.a, tokens, axis=0).astype(x.dtype)
        term = self.scale * jnp.dot(rows, self.b.astype(x.dtype), preferred_element_type=jnp.float32)
        return scaled_embeddings(x + term.astype(x.dtype), factor)

    def misfit(self, layers: tuple[int, ...], inputs: int, outputs: int) -> str | None:
        """The shapes of A and B, where they are others."""
        rank = self.a.shape[-1]
        shapes = (*layers, inputs, rank), (*layers, rank, outputs)
        if (self.a.shape, self.b.shape) == shapes:
            return None
        return f"A {self.a.shape} and B {self.b.shape}, not A {shapes[0]} and B {shapes[1]}"

    def merged(
        self, kernel: Float[Array, "inputs outputs"], bias: Float[Array, " outputs"] | None
    ) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"] | None]:
        """``W + scale · A B``."""
        product = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        return kernel + self.scale * product, bias


jax.tree_util.register_dataclass(
    LowRankAdapter, data_fields=["a", "b", "scale", "dropout_rate", "dropout_seed"], meta_fields=[]
)


@dataclasses.dataclass(frozen=True, init=False)
class SoftPrompt(Adapter):
    """Vectors in place of the embeddings of each document's first positions (Lester et al. 2021, arXiv:2104.08691).

    Attributes:
        prompt: One for each of these positions, float32; a family's factor on embeddings is not on them.
    """

    prompt: Float[Array, "*states positions d"]

    def __init__(self, prompt: Any) -> None:
        object.__setattr__(self, "prompt", prompt)

    def embedded(
        self,
        x: Float[Array, "b s d"],
        tokens: Int32[Array, "b s"],
        positions: Int32[Array, "b s"],
        factor: float | None,
    ) -> Float[Array, "b s d"]:
        """The vectors at the first positions, and the tokens' embeddings behind them."""
        del tokens
        own = jnp.take(self.prompt, jnp.minimum(positions, self.virtual_tokens - 1), axis=0).astype(x.dtype)
        return jnp.where((positions < self.virtual_tokens)[..., None], own, scaled_embeddings(x, factor))

    @property
    def virtual_tokens(self) -> int:
        """As many as there are vectors."""
        return self.prompt.shape[-2]

    def misfit(self, layers: tuple[int, ...], inputs: int, outputs: int) -> str | None:
        """Another width."""
        del layers, inputs
        return None if self.prompt.shape[-1] == outputs else f"vectors of {self.prompt.shape[-1]}, not {outputs}"


jax.tree_util.register_dataclass(SoftPrompt, data_fields=["prompt"], meta_fields=[])


def scaled_embeddings(x: Float[Array, "b s d"], factor: float | None) -> Float[Array, "b s d"]:
    """Embeddings with the family's factor on them."""
    return x if factor is None else x * jnp.asarray(factor, x.dtype)


class AdaptedLayer(NamedTuple):
    """What the product of an :class:`ArraysAdapter` is made of.

    Attributes:
        frozen: The layer and its input.
        arrays: Of this layer, by name.
        whole: What all layers have in common, by name.
    """

    frozen: FrozenLayer
    arrays: Mapping[str, Any]
    whole: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, init=False)
class ArraysAdapter(Adapter):
    """An adapter that is a function of arrays.

    Attributes:
        function: Makes the layer's result, see :meth:`Adapter.product`. One and the same at each call, as programs are
            compiled for it.
        arrays: By name; in a stack with the layer axis first.
        whole: By name; every layer is given them as they are.
    """

    function: Callable[[AdaptedLayer], Array]
    arrays: Mapping[str, Any]
    whole: Mapping[str, Any]

    def __init__(self, function: Callable[[AdaptedLayer], Array], arrays: Any, whole: Any = None) -> None:
        for name, value in (("function", function), ("arrays", arrays), ("whole", {} if whole is None else whole)):
            object.__setattr__(self, name, value)

    def product(self, layer: FrozenLayer) -> Float[Array, "*rows outputs"]:
        """What the function makes."""
        return self.function(AdaptedLayer(layer, self.arrays, self.whole))

    def unscanned(self) -> Any:
        """The arrays that are whole."""
        return self.whole

    def scanned(self) -> Adapter:
        """Without what is whole."""
        return ArraysAdapter(self.function, self.arrays)

    def joined(self, whole: Any) -> Adapter:
        """With it again."""
        return ArraysAdapter(self.function, self.arrays, whole)

    def batch_axes(self, axis: int) -> Any:
        """What is whole has no layers."""
        return ArraysAdapter(self.function, axis, 0)


jax.tree_util.register_dataclass(ArraysAdapter, data_fields=["arrays", "whole"], meta_fields=["function"])


def kept(y: Float[Array, "*rows outputs"]) -> Float[Array, "*rows outputs"]:
    """Names a result for remat policies: what the backward pass needs and a matmul would have to make again."""
    return checkpoint_name(y, PROJECTION)


def linear(
    x: Float[Array, "*rows inputs"],
    kernel: Float[Array, "inputs outputs"] | Quantized,
    bias: Float[Array, " outputs"] | None = None,
    adapter: Adapter | None = None,
    rows: UInt32[Array, "*rows"] | None = None,
    *,
    kernels: str = "auto",
    axes: Mapping[Any, Sequence[str]] | None = None,
) -> Float[Array, "*rows outputs"]:
    """``x W + bias``, or what an adapter makes of them; the result has x's dtype.

    Args:
        x: Input, in the compute dtype.
        kernel: W, (in, out).
        bias: Added to the result.
        adapter: The adapter of this module (of one layer, not of a stack).
        rows: An identity for each row of x, from which dropout is drawn; by default its index.
        kernels: One of :data:`KERNELS`, for the product with an adapter.
        axes: Mesh axes that ``rows``, ``inputs`` and ``outputs`` are cut over, for kernels that XLA does not partition.
    """
    layer = FrozenLayer(x, kernel, bias, rows, kernels, axes)
    return kept(layer.biased(layer.product())) if adapter is None else adapter.product(layer)


@functools.partial(jax.checkpoint, prevent_cse=False)
def low_rank_states(
    x: Float[Array, "*rows inputs"], adapter: LowRankAdapter, rows: UInt32[Array, "*rows"] | None = None
) -> Float[Array, "*rows rank"]:
    """``scale · dropout(x) A``, which B multiplies, where the layer's own product is made elsewhere; has x's dtype.

    The backward pass draws the mask again, as it does in :func:`jaxtune_kernels.low_rank_matmul`, with the same bits.

    Args:
        x: Input, in the compute dtype.
        adapter: The adapter of one layer.
        rows: An identity for each row of x, from which dropout is drawn; by default its index.
    """
    factor = adapter.scale
    if adapter.dropout_rate is not None:
        assert adapter.dropout_seed is not None
        if rows is None:
            rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(x.shape[:-1])
        x = jnp.where(keep_mask(adapter.dropout_seed, rows, x.shape[-1], adapter.dropout_rate), x, 0)
        factor = factor / (1.0 - adapter.dropout_rate)
    product = jnp.dot(x, adapter.a.astype(x.dtype), preferred_element_type=jnp.float32)
    return (factor * product).astype(x.dtype)
