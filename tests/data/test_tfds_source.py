from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxtune.config.data_section import SourceConfig
from jaxtune.data.product_listings import generate_rows
from jaxtune.data.sources import open_source
from jaxtune.data.tfds_source import plain
from jaxtune.errors import UserError

TURNS = [{"role": "user", "content": "grüß dich"}, {"role": "assistant", "content": "hello"}]


class NestedRows(tfds.core.GeneratorBasedBuilder):
    """Features of every kind that text data has."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "text": text(),
                    "count": np.int64,
                    "share": np.float32,
                    "blob": tfds.features.Tensor(shape=(), dtype=np.bytes_),
                    "tags": tfds.features.Sequence(text()),
                    "inner": {"name": text(), "flag": np.bool_},
                    "turns": tfds.features.Sequence({"role": text(), "content": text()}),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict]]:
        for index in range(count):
            inner = {"name": f"n{index}", "flag": True}
            row = {
                "text": f"ü{index}",
                "count": index,
                "share": 0.1,
                "blob": b"\xff",
                "tags": ["a", "b"],
                "inner": inner,
                "turns": TURNS,
            }
            yield index, row


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    tfds.builder("nested_rows", data_dir=str(folder)).download_and_prepare(file_format="array_record")
    return folder


def test_rows_are_plain_python_without_tensorflow(prepared: Path):
    rows = open_source(SourceConfig(path="tfds:nested_rows", split="train", data_dir=str(prepared)))
    assert len(rows) == 4
    assert rows[1] == {
        "text": "ü1",
        "count": 1,
        "share": 0.1,
        "blob": b"\xff",
        "tags": ["a", "b"],
        "inner": {"name": "n1", "flag": True},
        "turns": {"role": ["user", "assistant"], "content": ["grüß dich", "hello"]},
    }
    assert type(rows[1]["count"]) is int
    assert type(rows[1]["inner"]["flag"]) is bool
    assert rows.locate(3) == "tfds:nested_rows train, row 4"
    assert "tensorflow" not in sys.modules


def test_splits(prepared: Path):
    config = SourceConfig(path="tfds:nested_rows", data_dir=str(prepared))
    assert [row["count"] for row in open_source(config.model_copy(update={"split": "train[50%:]"}))] == [2, 3]
    with pytest.raises(UserError, match="several splits"):
        open_source(config)
    with pytest.raises(UserError, match="no split 'tests'; did you mean 'test'"):
        open_source(config.model_copy(update={"split": "tests"}))


def test_data_dir_may_be_the_data_sets_own_folder(prepared: Path):
    folder = str(prepared / "nested_rows" / "1.0.0")
    assert len(open_source(SourceConfig(path="tfds:nested_rows", split="test", data_dir=folder))) == 2
    with pytest.raises(UserError, match="holds nested_rows, not other"):
        open_source(SourceConfig(path="tfds:other", split="test", data_dir=folder))


def test_data_without_its_builder(prepared: Path, tmp_path: Path):
    # As on a machine that was handed the files alone.
    shutil.copytree(prepared / "nested_rows", tmp_path / "handed_over")
    info = tmp_path / "handed_over" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "nested_rows"', '"name": "handed_over"'))
    for file in info.parent.glob("nested_rows-*"):
        file.rename(file.with_name(file.name.replace("nested_rows", "handed_over")))
    rows = open_source(SourceConfig(path="tfds:handed_over", split="test", data_dir=str(tmp_path)))
    assert [row["text"] for row in rows] == ["ü0", "ü1"]


def test_unknown_name(prepared: Path):
    with pytest.raises(UserError, match="knows no data set 'nested_row'; did you mean 'nested_rows'"):
        open_source(SourceConfig(path="tfds:nested_row", data_dir=str(prepared)))
    with pytest.raises(UserError, match="did you mean 'product_listings'"):
        open_source(SourceConfig(path="tfds:product_listing", data_dir=str(prepared)))
    for name, part in (
        ("", "no data set"),
        ("product_listings/big", "big"),
        ("product_listings:9.9.9", r"versions: 1\.0"),
    ):
        with pytest.raises(UserError, match=f"data.train: tfds:{name} .*{part}"):
            open_source(SourceConfig(path=f"tfds:{name}", data_dir=str(prepared)))


def test_our_own_builder_is_prepared_on_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = open_source(SourceConfig(path="tfds:product_listings", split="train[:20]"))
    assert list(rows) == list(generate_rows("train", 20))
    told = capsys.readouterr()
    assert told.out == ""
    assert "generating tfds:product_listings in" in told.err
    assert "ownload" not in told.err
    assert (tmp_path / "jaxtune" / "tfds" / "product_listings").is_dir()
    again = open_source(SourceConfig(path="tfds:product_listings", split="validation", limit=5))
    assert list(again) == list(generate_rows("validation", 5))


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"set data\.train\.data_dir"):
        open_source(SourceConfig(path="tfds:product_listings", split="train"))


def test_plain_decodes_at_any_depth():
    value = {
        "a": np.array([b"x", b"y"], object),
        "b": [np.float32(0.1), {"c": b"\xc3\xbc", "unused": b"\xff", "missing": np.float32(np.nan)}],
        "d": np.ones((2, 1), np.int8),
    }
    assert plain(value) == {
        "a": ["x", "y"],
        "b": [0.1, {"c": "ü", "unused": b"\xff", "missing": None}],
        "d": [[1], [1]],
    }
