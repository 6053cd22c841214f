"""Kernels of parameter-efficient training, in pure JAX: they know nothing of models or trainers."""

from jaxtune_kernels.dropout import hash_words, keep_mask
from jaxtune_kernels.low_rank import low_rank_matmul

__all__ = ["hash_words", "keep_mask", "low_rank_matmul"]
