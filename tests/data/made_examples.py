"""Examples made up for tests of packing, and the way back from batches to examples."""

from __future__ import annotations

import numpy as np

from jaxtune.data.examples import Example


def make(lengths: list[int], seed: int = 0) -> list[Example]:
    """Examples of the given numbers of tokens, with tokens and weights that are told apart."""
    rng = np.random.default_rng(seed)
    return [
        Example(
            tokens=rng.integers(1, 1000, length).astype(np.int32),
            weights=np.r_[0, rng.random(length - 1) + 0.5].astype(np.float32),
            index=100 + place,
            prompt_length=1,
            fields={},
            completion="",
        )
        for place, length in enumerate(lengths)
    ]


def unpack(batch: dict[str, np.ndarray]) -> dict[int, tuple[list[int], list[float]]]:
    """The examples of a batch by id, having checked everything that a row promises."""
    found: dict[int, tuple[list[int], list[float]]] = {}
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all()
        steps = np.diff(segments[:used])
        assert ((steps == 0) | (steps == 1)).all()
        assert used == 0 or segments[0] == 1
        for name, empty in (("tokens", 0), ("targets", 0), ("weights", 0), ("positions", 0), ("example_ids", -1)):
            assert (batch[name][row, used:] == empty).all()
        for segment in range(1, segments.max(initial=0) + 1):
            place = np.flatnonzero(segments == segment)
            assert (np.diff(place) == 1).all()
            assert batch["positions"][row, place].tolist() == list(range(len(place)))
            (example,) = set(batch["example_ids"][row, place].tolist())
            tokens, targets = batch["tokens"][row, place], batch["targets"][row, place]
            assert (tokens[1:] == targets[:-1]).all()
            assert example not in found
            found[example] = ([*tokens.tolist(), int(targets[-1])], batch["weights"][row, place].tolist())
    return found
