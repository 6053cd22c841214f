from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config.data_section import ExplodeConfig
from jaxtune.data.explode import explode
from jaxtune.data.prompts import Template
from jaxtune.errors import UserError

ROWS = [
    {"id": 1, "kind": "shoe", "attributes": {"Brand": "Acme", "Color": ["red", "blue"], "Size": "", "Age": None}},
    {"id": 2, "kind": "tea", "attributes": {"Flavor": "mint"}},
]


def entries(rows, **options) -> list[tuple]:
    config = ExplodeConfig(field="attributes", **options)
    return [(row, fields[config.key], fields[config.value]) for row, fields in explode(rows, config)]


def schema_file(folder: Path, schema: object) -> str:
    path = folder / "schema.json"
    path.write_text(json.dumps(schema))
    return str(path)


def test_without_a_schema():
    # A list is one answer, an empty value is an answer too, a null is no entry.
    expected = [(0, "Brand", "Acme"), (0, "Color", "red, blue"), (0, "Size", "n/a"), (1, "Flavor", "mint")]
    assert entries(ROWS) == expected
    assert entries(ROWS, key="question", value="answer", absent="-")[2] == (0, "Size", "-")
    assert explode(ROWS, ExplodeConfig(field="attributes"))[3][1]["kind"] == "tea"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (1.5, "1.5"),
        ([True, False], "[true, false]"),
        ([1.5, math.nan], "[1.5, null]"),
        ([{"w": 1.5}], '[{"w": 1.5}]'),
        ({"w": [True, None]}, '{"w": [true, null]}'),
        (["red", ["dark", "blue"]], '["red", ["dark", "blue"]]'),
        (["red", None, "", "blue"], "red, blue"),
        ([None], "n/a"),
        ([math.nan], "n/a"),
        (np.float32(0.1), "0.1"),
        (np.array(["red", "blue"]), "red, blue"),
    ],
)
def test_values_are_json_but_texts_are_joined(value: object, text: str):
    config = ExplodeConfig(field="attributes")
    ((_, fields),) = explode([{"attributes": {"x": value}}], config)
    assert Template("{value}").render(fields, str) == text


def test_a_nan_is_no_entry():
    assert entries([{"attributes": {"x": math.nan, "y": "z"}}]) == [(0, "y", "z")]


def test_one_list_of_keys(tmp_path: Path):
    path = schema_file(tmp_path, ["Flavor", "Brand"])
    expected = [(0, "Flavor", "n/a"), (0, "Brand", "Acme"), (1, "Flavor", "mint"), (1, "Brand", "n/a")]
    assert entries(ROWS, schema_path=path) == expected


def test_keys_by_category(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = schema_file(tmp_path, {"shoe": ["Brand", "Sport"], "tea": ["Flavor"]})
    with caplog.at_level(logging.WARNING):
        found = entries(ROWS, schema_path=path, schema_by="kind")
    assert found == [(0, "Brand", "Acme"), (0, "Sport", "n/a"), (1, "Flavor", "mint")]
    assert "1 values have keys outside" in caplog.text  # Color; empty ones say nothing


def test_bad_rows():
    with pytest.raises(UserError, match=r"row 1 has no field 'atributes'.*did you mean 'attributes'"):
        explode(ROWS, ExplodeConfig(field="atributes"))
    with pytest.raises(UserError, match=r"explode\.key: row 1 already has a field 'kind'"):
        entries(ROWS, key="kind")
    with pytest.raises(UserError, match=r"row 1: field 'kind' .* holds str, not a mapping"):
        explode(ROWS, ExplodeConfig(field="kind"))
    with pytest.raises(UserError, match="has no entry in any row"):
        entries([{"attributes": {"Brand": None}}])


def test_bad_schemas(tmp_path: Path):
    path = schema_file(tmp_path, {"shoe": ["Brand"], "tee": ["Flavor"]})
    with pytest.raises(UserError, match="say which field picks the category"):
        entries(ROWS, schema_path=path)
    with pytest.raises(UserError, match=r"row 2: .* no category 'tea'; did you mean 'tee'"):
        entries(ROWS, schema_path=path, schema_by="kind")
    with pytest.raises(UserError, match="row 1 has no field 'kinds'; did you mean 'kind'"):
        entries(ROWS, schema_path=path, schema_by="kinds")
    with pytest.raises(UserError, match=r"does not exist; did you mean 'schema\.json'"):
        entries(ROWS, schema_path=str(tmp_path / "shema.json"))
    with pytest.raises(UserError, match="leave schema_by out"):
        entries(ROWS, schema_path=schema_file(tmp_path, ["Brand"]), schema_by="kind")
    with pytest.raises(UserError, match="neither a list of keys nor"):
        entries(ROWS, schema_path=schema_file(tmp_path, {"shoe": "Brand"}))
    (tmp_path / "schema.json").write_text('{"shoe": ["Brand"], "tea": ["Flavor"], "shoe": ["Color"]}')
    with pytest.raises(UserError, match=r"schema_path: .*schema\.json: malformed JSON: the key 'shoe' stands twice"):
        entries(ROWS, schema_path=path)
    (tmp_path / "schema.json").write_text('{\n"shoe": [}')
    with pytest.raises(UserError, match="line 2: malformed JSON"):
        entries(ROWS, schema_path=path)


def test_a_schema_file_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "schema.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"schema_path: .*schema\.json: not UTF-8"):
        entries(ROWS, schema_path=str(path))
    with pytest.raises(UserError, match=r"schema_path: .* cannot be read"):
        entries(ROWS, schema_path=str(tmp_path))


def test_a_category_that_is_no_text(tmp_path: Path):
    rows = [{"kind": ["shoe"], "attributes": {"Brand": "Acme"}}]
    with pytest.raises(UserError, match="no category"):
        entries(rows, schema_path=schema_file(tmp_path, {"shoe": ["Brand"]}), schema_by="kind")
