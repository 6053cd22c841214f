"""Many paired comparisons at once: what each is worth, and which of them are left when all are looked at together."""

from __future__ import annotations

import numpy as np

from jaxtune.experiments.paired import holm

__all__ = ["holm", "sign_flips"]

_DRAWS = 100_000


def sign_flips(differences: np.ndarray) -> list[float]:
    """Two-sided p-values of means of paired differences: how often random signs make one that is as far from zero.

    Args:
      differences: [n, k], k comparisons of n pairs each.
    """
    signs = np.random.default_rng(0).integers(0, 2, (_DRAWS, len(differences)), np.int8) * np.float32(2) - 1
    # Sums in another order may differ in their last bits from one that is as large.
    reached = np.abs(signs @ differences.astype(np.float32)) >= np.abs(differences.sum(0)) * (1 - 1e-5)
    return ((1 + reached.sum(0)) / (1 + _DRAWS)).tolist()
