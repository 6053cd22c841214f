from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxtune.config.data_section import SourceConfig
from jaxtune.data.sources import open_source
from jaxtune.data.splits import parse_split, unit_hash
from jaxtune.errors import UserError

ROWS = [{"id": f"row-{index}", "text": f"text {index}", "group": index // 3} for index in range(30)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def source(path: Path | str, **options):
    return open_source(SourceConfig(path=str(path), **options))


def test_jsonl_plain_and_gzip_give_the_same_rows(file: Path, tmp_path: Path):
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert list(source(file)) == ROWS
    assert list(source(packed)) == ROWS
    assert source(file)[-1] == ROWS[-1]


def test_only_newlines_end_a_line_and_blank_lines_count(tmp_path: Path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\n\n{"a": "z"}\r\n'.encode())
    rows = source(path)
    assert list(rows) == [{"a": "x\u2028y"}, {"a": "z"}]
    assert rows.locate(1) == f"{path}, line 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2\n', "line 2: malformed JSON"),
        (b'{"a": 1}\n\n[1, 2]\n', "line 3: a row is a JSON object, not list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8"),
        (b'{"a": 1}\n{"a": "\\ud800"}\n', r"line 2: .*half of a surrogate pair"),
        (b'{"a": 1}\n' + b"[" * 50_000 + b"\n", "line 2: malformed JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: malformed JSON"),
        (b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2: malformed JSON: the key 'a' stands twice"),
        (b'{"a": [{"c": 1, "c": 1}]}\n', "line 1: malformed JSON: the key 'c' stands twice"),
        (b'{"a": 1}\n{"a": -Infinity}\n', "line 2: malformed JSON: -Infinity is no number"),
        (b"", "no rows"),
        (b"\n  \n", "no rows"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        source(path)
    assert "bad.jsonl" in str(caught.value)
    assert str(caught.value).startswith("data.train")


def test_nan_is_null(tmp_path: Path):
    path = tmp_path / "nan.jsonl"
    path.write_text('{"a": NaN, "b": [1, NaN]}\n')
    assert list(source(path)) == [{"a": None, "b": [1, None]}]


def test_whole_surrogate_pairs_are_characters(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n')
    assert list(source(path)) == [{"a": "\U0001f600"}]


def test_a_missing_file_is_not_answered_with_a_folder_listing(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match=r"does not exist; did you mean 'train\.jsonl'"):
        source(tmp_path / "trian.jsonl")
    with pytest.raises(UserError) as caught:
        source(tmp_path / "zzz.parquet")
    assert "thesis" not in str(caught.value)


def test_damaged_gzip(tmp_path: Path):
    cut = tmp_path / "cut.jsonl.gz"
    text = "".join(json.dumps({"a": index, "hash": unit_hash(index, 0)}) + "\n" for index in range(2000))
    cut.write_bytes(gzip.compress(text.encode())[:-500])
    with pytest.raises(UserError, match="damaged gzip"):
        source(cut)
    none = tmp_path / "none.jsonl.gz"
    none.write_text("not compressed")
    with pytest.raises(UserError, match="damaged gzip"):
        source(none)


def test_missing_file_names_the_nearest(file: Path):
    with pytest.raises(UserError, match=r"row\.jsonl does not exist; did you mean 'rows\.jsonl'\?"):
        source(file.parent / "row.jsonl")
    with pytest.raises(UserError, match=f"{file.parent}/nowhere does not exist"):
        source(file.parent / "nowhere" / "rows.jsonl")


def test_unknown_kinds(file: Path):
    other = file.with_suffix(".csv")
    other.write_text("a,b\n")
    with pytest.raises(UserError, match="of no known kind"):
        source(other)
    with pytest.raises(UserError, match=r"is a folder, but not one that datasets saved.*rows\.jsonl"):
        source(file.parent)


def test_slices_and_limit(file: Path):
    assert list(source(file, split="train")) == ROWS
    assert list(source(file, split="train[:7]")) == ROWS[:7]
    assert list(source(file, split="[-4:]")) == ROWS[-4:]
    assert list(source(file, split="[10%:20%]")) == ROWS[3:6]
    assert list(source(file, split="train[5:]", limit=3)) == ROWS[5:8]
    part = source(file, split="[10:20]")
    assert part.locate(2).endswith("rows.jsonl, line 13")
    assert list(part[1:3]) == ROWS[11:13]


@pytest.mark.parametrize("split", ["train[:", "train[1:2:3]", "a:b", "train[x:]", "train[1.5:]", "a+b[:2]c"])
def test_malformed_splits(file: Path, split: str):
    with pytest.raises(UserError, match="is no split"):
        source(file, split=split)


def test_unknown_and_empty_splits(file: Path):
    with pytest.raises(UserError, match=r"no split 'trian'; did you mean 'train'\?"):
        source(file, split="trian[:5]")
    with pytest.raises(UserError, match=r"split '\[50:60\]' keeps none of the rows"):
        source(file, split="[50:60]")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.one_of(st.none(), st.integers(-250, 250)), st.one_of(st.none(), st.integers(-250, 250)))
def test_slices_are_pythons(count: int, start: int | None, stop: int | None):
    text = f"name[{'' if start is None else start}:{'' if stop is None else stop}]"
    assert list(parse_split(text, key="k").rows(count)) == list(range(count))[start:stop]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.lists(st.integers(0, 100), max_size=5))
def test_percentages_part_the_rows(count: int, cuts: list[int]):
    bounds = [0, *sorted(cuts), 100]
    parts = [parse_split(f"[{low}%:{high}%]", key="k").rows(count) for low, high in itertools.pairwise(bounds)]
    assert [row for part in parts for row in part] == list(range(count))


@settings(deadline=None, max_examples=50)
@example(150, 7)
@given(st.integers(0, 5000), st.integers(0, 100))
def test_a_share_is_the_nearest_row(count: int, percent: int):
    """Halves go to the even row, as tensorflow_datasets reckons: round(percent * count / 100)."""
    assert len(parse_split(f"[:{percent}%]", key="k").rows(count)) == round(percent * count / 100)
    assert len(parse_split(f"[:{percent}.0%]", key="k").rows(count)) == round(percent * count / 100)


def test_hash_split_parts_the_rows(file: Path):
    parts = [source(file, hash_split=bounds, hash_by="id") for bounds in ((0, 0.5), (0.5, 0.8), (0.8, 1))]
    assert sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in ROWS)
    assert [len(part) > 0 for part in parts] == [True] * 3
    other = source(file, hash_split=(0, 0.5), hash_by="id", hash_seed=1)
    assert list(other) != list(parts[0])
    assert parts[0].locate(0).endswith(f"line {ROWS.index(parts[0][0]) + 1}")


def test_hash_split_keeps_groups_together(file: Path):
    low, high = (source(file, hash_split=bounds, hash_by="group") for bounds in ((0, 0.5), (0.5, 1)))
    assert not {row["group"] for row in low} & {row["group"] for row in high}
    with pytest.raises(UserError, match=r"line 1 has no field 'grup'; did you mean 'group'\?"):
        source(file, hash_split=(0, 1), hash_by="grup")
    with pytest.raises(UserError, match=r"is no part of \[0, 1\)"):
        source(file, hash_split=(0.5, 0.5))


def test_hash_is_the_same_everywhere():
    # Written down once: a change of these numbers would silently move rows between train and test.
    expected = [0.4791397462262518, 0.45925880582005363, 0.85985457137225]
    code = (
        "from jaxtune.data.splits import unit_hash\n"
        "print([unit_hash('row-1', 0), unit_hash({'b': 1, 'a': 'ä'}, 0), unit_hash(7, 3)])"
    )
    assert [unit_hash("row-1", 0), unit_hash({"a": "ä", "b": 1}, 0), unit_hash(7, 3)] == expected
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == expected


def test_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    maps = pyarrow.array([[("x", "1")], [("y", "2"), ("z", "3")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "structs": [{"k": 1}, {"l": 2}], "maps": maps}), path)
    rows = source(path)
    assert rows[0] == {"text": "a", "structs": {"k": 1, "l": None}, "maps": {"x": "1"}}
    assert rows[1]["maps"] == {"y": "2", "z": "3"}
    assert rows.locate(1) == f"{path}, row 2"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="no readable Parquet"):
        source(path)


def test_saved_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    assert list(source(tmp_path / "one")) == ROWS
    assert list(source(tmp_path / "one", split="train[2:4]")) == ROWS[2:4]
    splits = datasets.DatasetDict({"train": dataset.select(range(20)), "test": dataset.select(range(20, 30))})
    splits.save_to_disk(str(tmp_path / "two"))
    assert list(source(tmp_path / "two", split="test")) == ROWS[20:]
    with pytest.raises(UserError, match="several splits: say which of train, test"):
        source(tmp_path / "two")
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        source(tmp_path / "two", split="tset")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="damaged saved data set"):
        source(tmp_path / "one")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'jaxtune\[datasets\]'"):
        source(tmp_path / "two", split="test")


def test_messages_name_the_given_key(file: Path):
    with pytest.raises(UserError, match=r"^data\.validation\.split: "):
        open_source(SourceConfig(path=str(file), split="no"), key="data.validation")
