"""What rows hold, by where they come from; and what templates write of it."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.data_section import SourceConfig
from jaxtune.data.arrow_rows import arrow_rows
from jaxtune.data.prompts import Template
from jaxtune.data.sources import open_source
from jaxtune.data.splits import unit_hash
from jaxtune.errors import UserError

UTC = datetime.UTC


def written(value: Any) -> str:
    return Template("{v}").render({"v": value}, lambda: "row 1")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02T03:04:05"),
        (datetime.datetime(2024, 1, 2, 3, 4, 5, 6000, UTC), "2024-01-02T03:04:05.006000+00:00"),
        (np.datetime64("2024-01-02T03:04:05.000006001"), "2024-01-02T03:04:05.000006001"),
        (np.datetime64("2024-01-02T03:04:05.006"), "2024-01-02T03:04:05.006000"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(minutes=2), "120"),
        (datetime.timedelta(milliseconds=-1500), "-1.5"),
        (np.timedelta64(250, "ms"), "0.25"),
        (decimal.Decimal("1.50"), "1.50"),
        (decimal.Decimal("1.2E+3"), "1200"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (b"gr\xc3\xbcn", "grün"),
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.float64(0.1), "0.1"),
        (np.array([0.1, np.nan], np.float32), "[0.1, null]"),
        (np.array([[1, 2]], np.int8), "[[1, 2]]"),
        (np.bool_(True), "true"),
        ([datetime.date(2024, 1, 2), {"w": 1.5}, (True, None)], '["2024-01-02", {"w": 1.5}, [true, null]]'),
        ({3: [float("nan")]}, '{"3": [null]}'),
    ],
)
def test_values_as_text(value: Any, text: str):
    assert written(value) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"\xff", "field 'v' holds bytes that are no UTF-8"),
        ({"a": [b"\xff"]}, "field 'v' holds bytes that are no UTF-8"),
        (math.inf, "field 'v' holds an infinite number"),
        ([np.float32(-np.inf)], "field 'v' holds an infinite number"),
        (object(), "field 'v' holds a value of type object"),
        (math.nan, "field 'v' is null"),
        (np.float32(np.nan), "field 'v' is null"),
        (np.datetime64("NaT"), "field 'v' is null"),
        (decimal.Decimal("NaN"), "field 'v' is null"),
    ],
)
def test_values_without_text_are_refused_with_the_row(value: Any, message: str):
    with pytest.raises(UserError, match=f"^data.prompt: row 1: {message}$"):
        written(value)


def test_a_value_nested_too_deeply_is_refused_with_the_row():
    value: Any = 1
    for _ in range(5000):
        value = [value]
    with pytest.raises(UserError, match="row 1: field 'v' holds a value that is nested too deeply"):
        written(value)


@settings(deadline=None, max_examples=100)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_is_the_shortest_number_that_is_read_back(value: float):
    with np.errstate(over="ignore"):
        numbers = [float(f"{value:.{digits}e}") for digits in range(9)]
        shortest = next(number for number in numbers if np.float32(number) == np.float32(value))
    text = written(np.float32(value))
    assert np.float32(float(text)) == np.float32(value)
    assert len(text) <= len(repr(shortest))


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=50)
@given(JSON_LIKE.filter(lambda value: value is not None))
def test_what_json_holds_is_written_as_json(value: Any):
    assert written(value) == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


@pytest.fixture
def table() -> Any:
    """Two rows of every type that other programs write, the second hardly readable."""
    pa = pytest.importorskip("pyarrow")
    inner = pa.struct({"at": pa.timestamp("ns"), "half": pa.float32()})
    invalid = pa.py_buffer(b"ok\xff"), pa.py_buffer(np.array([0, 2, 3], np.int32).tobytes())
    return pa.table(
        {
            "text": ["a", "b"],
            "ns": pa.array([1_000_000_000_000_000_001, None], pa.timestamp("ns")),
            "far": pa.array([0, 10**12], pa.timestamp("s")),
            "zone": pa.array([1_700_000_000_250, None], pa.timestamp("ms", "Europe/Berlin")),
            "offset": pa.array([0, 10**15], pa.timestamp("s", "-03:30")),
            "date": pa.array([19724, 10**8], pa.date32()),
            "day": pa.array([86_400_000, None], pa.date64()),
            "time": pa.array([3_000_000_001, None], pa.time64("ns")),
            "wait": pa.array([90_000, 1_500], pa.duration("ms")),
            "price": pa.array([decimal.Decimal("1.50"), None], pa.decimal128(10, 2)),
            "binary": pa.array([b"gr\xc3\xbcn", b"\xff"], pa.binary()),
            "short": pa.array([0.1, float("nan")], pa.float32()),
            "half": pa.array([0.1, None], pa.float32()).cast(pa.float16()),
            "number": pa.array([0.1, float("nan")]),
            "kind": pa.array(["x", "x"]).dictionary_encode(),
            "inner": pa.array([[{"at": 1, "half": 0.1}], None], pa.list_(inner)),
            "pair": pa.array([[1.5, float("nan")], None], pa.list_(pa.float32(), 2)),
            "map": pa.array([[(0, 0)], [(1, None)]], pa.map_(pa.date32(), pa.duration("s"))),
            "broken": pa.Array.from_buffers(pa.string(), 2, [None, invalid[1], invalid[0]]),
            "whole": pa.array([1, None], pa.uint8()),
            "flag": pa.array([True, None]),
        }
    )


EXPECTED = {
    "text": ["a", "b"],
    "ns": ["2001-09-09T01:46:40.000000001", None],
    "far": ["1970-01-01T00:00:00", "33658-09-27T01:46:40"],
    "zone": ["2023-11-14T23:13:20.250000+01:00", None],
    "offset": ["1969-12-31T20:30:00-03:30", "31690708-07-05T01:46:40+00:00"],
    "date": ["2024-01-02", "275760-09-13"],
    "day": ["1970-01-02", None],
    "time": ["00:00:03.000000001", None],
    "wait": [90, 1.5],
    "price": ["1.50", None],
    "binary": ["grün", b"\xff"],
    "short": [0.1, None],
    "half": [0.1, None],
    "number": [0.1, None],
    "kind": ["x", "x"],
    "inner": [[{"at": "1970-01-01T00:00:00.000000001", "half": 0.1}], None],
    "pair": [[1.5, None], None],
    "map": [{"1970-01-01": 0}, {"1970-01-02": None}],
    "broken": ["ok", b"\xff"],
    "whole": [1, None],
    "flag": [True, None],
}


def test_parquet_of_every_type(table: Any, tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    # Parquet has no whole seconds: these times would not fit into milliseconds or finer.
    parquet.write_table(table.drop_columns(["far", "offset"]), path)
    rows = open_source(SourceConfig(path=str(path)))
    for name, values in EXPECTED.items():
        if name not in ("far", "offset"):
            assert [row[name] for row in rows] == values, name
    render = Template("{text} {price} {wait} {ns} {binary} {short}").render
    assert render(rows[0], lambda: rows.locate(0)) == "a 1.50 90 2001-09-09T01:46:40.000000001 grün 0.1"
    with pytest.raises(UserError, match=r"rows\.parquet, row 2: field 'binary' holds bytes that are no UTF-8"):
        Template("{binary}").render(rows[1], lambda: rows.locate(1))
    assert len(open_source(SourceConfig(path=str(path), hash_split=(0, 1)))) == 2
    assert 0 <= unit_hash(rows[1], 0) < 1


def test_arrow_rows_of_every_type(table: Any):
    assert arrow_rows(table, str) == [
        dict(zip(EXPECTED, row, strict=True)) for row in zip(*EXPECTED.values(), strict=True)
    ]
    assert arrow_rows(table.slice(1), str)[0]["far"] == EXPECTED["far"][1]


def test_a_saved_data_set_is_read_as_parquet_is(table: Any, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    names = ["text", "ns", "zone", "wait", "price", "binary", "short", "inner"]
    dataset = datasets.Dataset(table.select(names))
    dataset = dataset.add_column("picture", [{"bytes": b"no picture", "path": None}] * 2)
    dataset.cast_column("picture", datasets.Image()).with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    rows = open_source(SourceConfig(path=str(tmp_path / "saved")))
    for name in names:
        assert [row[name] for row in rows] == EXPECTED[name], name
    assert rows[1]["picture"] == {"bytes": "no picture", "path": None}


def test_keys_given_twice_are_refused_with_the_row(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    maps = pa.array([[("x", 1)], [("y", 1), ("y", 2)]], pa.map_(pa.string(), pa.int32()))
    parquet.write_table(pa.table({"maps": maps}), path)
    with pytest.raises(
        UserError, match=r"^data.train: .*rows\.parquet, row 2: column 'maps': the key 'y' stands twice"
    ):
        open_source(SourceConfig(path=str(path)))
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(UserError, match="column 's': the key 'a' stands twice"):
        arrow_rows(pa.table({"s": twice}), lambda index: f"row {index + 1}")
