from __future__ import annotations

import pytest

from jaxtune.data.prompts import Template
from jaxtune.errors import UserError

ROW = {
    "text": "a {shoe}",
    "attribute": "Color",
    "Item form": "pair",
    "inner": {"deep": {"x": 3}},
    "a.b": "dot",
    "n": None,
}


def render(text: str) -> str:
    return Template(text).render(ROW, lambda: "rows.jsonl, line 3")


def test_fields():
    assert render("{text}\n{attribute}:") == "a {shoe}\nColor:"
    assert render("{{{text}}} {Item form}") == "{a {shoe}} pair"
    assert render("no field") == "no field"
    assert Template("{b} {a} {b}").fields == ("b", "a")


def test_nested_fields_and_other_values():
    assert render("{inner.deep.x} {a.b}") == "3 dot"
    assert render("{inner}") == '{"deep": {"x": 3}}'
    assert Template("{v}").render({"v": [True, "ü", 0.1]}, str) == '[true, "ü", 0.1]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{atribute}", r"data\.prompt: rows\.jsonl, line 3 has no field 'atribute'; did you mean 'attribute'\?"),
        ("{inner.dep}", r"no field 'inner\.dep'; did you mean 'deep'\?"),
        ("{text.x}", r"no field 'text\.x'"),
        ("{n}", "field 'n' is null"),
        ("{text", "expected '}'"),
        ("text}", "Single '}'"),
        ("{}", "a field is a name in braces"),
        ("{text!r}", "a field is a name in braces"),
        ("{text:>10}", "a field is a name in braces"),
    ],
)
def test_errors(text: str, message: str):
    with pytest.raises(UserError, match=message):
        render(text)
