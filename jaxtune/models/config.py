"""What one decoder computes, as values: every supported family is a choice of these, none is a copy of the code."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
Quantization = Literal["nf4", "int8", "fp8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "int8", "fp8")
ROPE_KINDS = ("default", "linear", "llama3")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864) and how its frequencies are scaled.

    Attributes:
        theta: Base of the geometric series of frequencies.
        kind: ``default`` (unscaled), ``linear`` (every frequency divided by ``factor``: position interpolation,
            arXiv:2306.15595) or ``llama3`` (only long wavelengths divided, with a smooth passage between).
        factor: Divisor of ``linear`` and ``llama3``.
        low_freq_factor: ``llama3``: wavelengths above the original context length over this are divided.
        high_freq_factor: ``llama3``: wavelengths below the original context length over this are kept.
        original_max_position_embeddings: ``llama3``: context length of the pretraining, in tokens.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope kind {self.kind!r} is none of {', '.join(ROPE_KINDS)}")
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope theta ({self.theta}) and factor ({self.factor}) must be positive")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            factors = f"low_freq_factor ({self.low_freq_factor}) < high_freq_factor ({self.high_freq_factor})"
            raise ValueError(f"llama3 rope needs {factors}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Hashable, so that it can be a static argument of a jitted function.

    Attributes:
        family: Name of the family it was read from; used for reading and writing checkpoints, never for computing.
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads (grouped-query attention); divides ``num_heads``.
        head_dim: Width of one head.
        norm_eps: Epsilon of every RMS norm.
        norm_plus_one: Norms multiply by ``1 + scale`` (Gemma) instead of ``scale``.
        post_norms: Also norm the output of attention and MLP before it is added (Gemma 2 and 3).
        qk_norm: RMS norm of each query and key head before the rotation.
        qkv_bias: q, k and v have biases.
        output_bias: The attention output projection has a bias.
        mlp_bias: The MLP projections have biases.
        activation: Of the gate: ``silu``, ``gelu_tanh`` (tanh approximation) or ``gelu`` (exact).
        tie_embeddings: The head is the transposed embedding table; there is no ``lm_head``.
        windows: Per layer, the number of last positions a query sees, itself included; None sees all. Empty means
            None everywhere. Only one size may occur besides None.
        rope: Rotary embedding of all layers, or of the layers without a window if ``local_rope`` is given.
        local_rope: Rotary embedding of the layers with a window, where it differs (Gemma 3).
        query_pre_attn_scalar: Scores are divided by its square root; None means ``head_dim``.
        attention_soft_cap: Scores become ``cap * tanh(scores / cap)``; None means no cap.
        final_soft_cap: The same for the logits.
        embedding_scale: Factor on the embeddings, rounded to the compute dtype before use; None means 1.
        max_position_embeddings: Longest context of the pretraining, in tokens; not enforced.
        initializer_range: Standard deviation of random weights.
        bos_token_id: Beginning of a text, or None.
        eos_token_ids: Tokens that end a generation.
        pad_token_id: Padding, or None.
        model_type: The ``model_type`` of the ``config.json`` it was read from, where that is not the family's name (a
            model of several parts). Names the modules of that model and is not compared: it computes the same.
        quantization: How the kernels of the layers are held: ``nf4``, ``int8`` or ``fp8`` (see
            :class:`jaxtune_kernels.Quantized`), or None, as they are.
        dequantized_from: How they were held before they were written out again. Not compared.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    query_pre_attn_scalar: float | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    model_type: str | None = dataclasses.field(default=None, compare=False)
    quantization: Quantization | None = None
    dequantized_from: Quantization | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: the rotary embedding turns pairs")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")
        finite = {window for window in self.windows if window is not None}
        if len(finite) > 1 or any(window < 1 for window in finite):
            raise ValueError(f"windows must be None or one positive size, not {sorted(finite)}")

    @property
    def window(self) -> int | None:
        """The one window size, or None where no layer has a window."""
        return next((window for window in self.windows if window is not None), None)

    @property
    def query_scale(self) -> float:
        """Factor on the attention scores."""
        scalar = self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar
        return float(scalar) ** -0.5
