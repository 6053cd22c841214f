"""Kernels of parameter-efficient training, in pure JAX: they know nothing of models or trainers."""

from jaxtune_kernels.dropout import hash_words, keep_mask
from jaxtune_kernels.linear_cross_entropy import linear_cross_entropy
from jaxtune_kernels.low_rank import low_rank_matmul

__all__ = ["hash_words", "keep_mask", "linear_cross_entropy", "low_rank_matmul"]
