from __future__ import annotations

import pytest

from jaxtune.errors import UserError
from jaxtune.updates.patterns import Pattern

Q = "layers.7.attention.q.kernel"


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        (Q, Q),
        ("layers.7.attention.q", Q),
        ("layers", Q),
        ("layers.*.attention.{q,v}", Q),
        ("layers.*.attention.{q,v}", "layers.7.attention.q.bias"),
        ("layers.{0..7}.attention", Q),
        ("layers.{3,7}.**", Q),
        ("**", Q),
        ("**.kernel", Q),
        ("**.q", Q),
        ("layers.**.kernel", Q),
        ("layers.7.**", "layers.7"),
        ("layers.**.7.attention", Q),
        ("**.attention.**.kernel", Q),
        ("layers.*.*_norm", "layers.0.attention_post_norm.scale"),
        ("layers.*.{attention.q,mlp.*}", Q),
        ("layers.*.{attention.q,mlp.*}", "layers.0.mlp.up.kernel"),
        ("layers.1{0..2}.mlp", "layers.11.mlp.up.kernel"),
    ],
)
def test_matches(pattern, path):
    assert Pattern(pattern).matches(path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("layers.7.attention.q.kern", Q),
        ("layers.7.att", Q),
        ("layers.*.q", Q),
        ("layers.{0..6}.attention", Q),
        ("layers.{1..2}.attention", "layers.12.attention.q.kernel"),
        ("layers.1.attention", "layers.11.attention.q.kernel"),
        ("**.bias", Q),
        ("layers.*.attention.{q,v}", "layers.7.attention.q_norm.scale"),
        ("layers.*.attention.*_norm", Q),
        ("attention.q", Q),
        ("layers.attention", "layersXattention"),
    ],
)
def test_does_not_match(pattern, path):
    assert not Pattern(pattern).matches(path)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", "empty part"),
        ("layers..mlp", "empty part"),
        (".layers", "empty part"),
        ("layers.", "empty part"),
        ("layers.{q,v", r"from '\{q,v' on"),
        ("layers.q}", r"from '\}' on"),
        ("layers.{a,{b,c}}", "cannot be read"),
        ("layers.{a,}", "empty part"),
        ("layers.{}", "empty part"),
        ("layers.{7..0}", r"range \{7..0\}"),
        ("layers.{0..999999999}", "range"),
        ("layers.a**", "beside other characters"),
        ("layers.***", "beside other characters"),
        ("layers.{**,a}", "beside other characters"),
        ("layers.[0-9].mlp", r"from '\[0-9\]"),
        ("layers.* .mlp", "cannot be read"),
        (r"layers.\d+", "cannot be read"),
    ],
)
def test_malformed(pattern, reason):
    with pytest.raises(UserError, match=reason) as error:
        Pattern(pattern)
    assert repr(pattern) in str(error.value)
    assert "write 'layers" in str(error.value)


def test_alternatives_spell_out_names_but_not_ranges():
    texts = [each.text for each in Pattern("layers.{0..7}.{attention.q,mlp}").alternatives]
    assert texts == ["layers.{0..7}.attention.q", "layers.{0..7}.mlp"]
    assert len(Pattern("{a,b}.{c,d}.e").alternatives) == 4
