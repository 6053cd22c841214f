"""Fingerprints of splits: equal for equal examples, and for no others."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.examples import Example
from jaxtune.data.fingerprint import fingerprint

# Few values, so that different splits have much in common.
PIECE = st.tuples(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 1.0])), max_size=3),
    st.integers(0, 1),
    st.sampled_from(["", "a", "aa", "ä"]),
)
SPLIT = st.lists(PIECE, max_size=3)


def examples(split, fields) -> list[Example]:
    made = []
    for index, (pairs, prompt, completion) in enumerate(split):
        tokens, weights = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
        made.append(Example(tokens.astype(np.int32), weights.astype(np.float32), index, prompt, fields, completion))
    return made


@settings(deadline=None)
@given(one=SPLIT, other=SPLIT)
def test_equal_exactly_where_the_examples_are(one, other):
    # Fields that no template shows to the model make no other data.
    equal = fingerprint(examples(one, {"note": 1})) == fingerprint(examples(other, {}))
    assert equal == (one == other)
