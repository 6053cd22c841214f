"""Kernels of parameter-efficient training, in pure JAX and Pallas: they know nothing of models or trainers."""

from jaxtune_kernels.dropout import hash_words, keep_mask
from jaxtune_kernels.linear_cross_entropy import linear_cross_entropy
from jaxtune_kernels.low_rank import LOW_RANK_STATES, low_rank_matmul
from jaxtune_kernels.masked_update import (
    MaskedUpdate,
    Selection,
    masked_update,
    put_blocks,
    share_out_blocks,
    take_blocks,
)
from jaxtune_kernels.masked_update.transformation import masked_transformation
from jaxtune_kernels.quantized import Quantized, quantize, quantized_matmul

__all__ = [
    "LOW_RANK_STATES",
    "MaskedUpdate",
    "Quantized",
    "Selection",
    "hash_words",
    "keep_mask",
    "linear_cross_entropy",
    "low_rank_matmul",
    "masked_transformation",
    "masked_update",
    "put_blocks",
    "quantize",
    "quantized_matmul",
    "share_out_blocks",
    "take_blocks",
]
