"""What a split holds, in a few characters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.data.examples import Example


def fingerprint(examples: Sequence[Example]) -> dict[str, Any]:
    """A split as the model and its scores see it: two are equal exactly where all examples are, in their order.

    Args:
      examples: as rendered and encoded.

    Returns:
      ``examples``, their number, and ``digest``, of token ids, loss weights, where each prompt ends, and the answers.
    """
    digest = hashlib.blake2b(digest_size=16)
    shape = [(len(example.tokens), example.prompt_length, len(example.completion)) for example in examples]
    digest.update(np.asarray(shape, "<i8").tobytes())
    for example in examples:
        digest.update(example.tokens.astype("<i4", copy=False).tobytes())
        digest.update(example.weights.astype("<f4", copy=False).tobytes())
        digest.update(example.completion.encode("utf-8", "surrogatepass"))
    return {"examples": len(examples), "digest": digest.hexdigest()}
