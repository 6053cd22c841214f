"""Rows from files and data sets, with random access and a place to point at when a row is wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config.data_section import SourceConfig
from jaxtune.data.arrow_rows import arrow_rows
from jaxtune.data.splits import parse_split, unit_hash
from jaxtune.data.tfds_source import TFDS_PREFIX, tfds_splits
from jaxtune.data.values import read_json
from jaxtune.errors import UserError, nearest
from jaxtune.remote_paths import hub_data_advice, is_hub_name, local_path

# The name of a file's only split, as in the `datasets` library.
FILE_SPLIT = "train"


class Source(Sequence[dict]):
    """Rows with random access that know where they come from.

    Attributes:
      name: the file or data set, as messages name it.
      filled: the rows come from Arrow, where a record has the keys of all others, null where it had none.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        *,
        name: str,
        unit: str = "row",
        numbers: Sequence[int] | None = None,
        filled: bool = False,
    ):
        """Wraps ``rows``.

        Args:
          rows: what to wrap; a row is a dict.
          name: the file or data set, for messages.
          unit: what a row is called there ("line", "row").
          numbers: each row's number there; counted from 1 if not given.
          filled: see the attribute.
        """
        self.name = name
        self.filled = filled
        self._rows = rows
        self._unit = unit
        self._numbers = range(1, len(rows) + 1) if numbers is None else numbers
        self._indices: Sequence[int] = range(len(rows))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.subset(self._indices[index])
        return self._rows[self._indices[index]]

    def __iter__(self) -> Iterator[dict]:
        return (self._rows[index] for index in self._indices)

    def subset(self, indices: Sequence[int]) -> Source:
        """The rows at ``indices`` (of the wrapped rows), which keep their places."""
        part = Source(self._rows, name=self.name, unit=self._unit, numbers=self._numbers, filled=self.filled)
        part._indices = indices
        return part

    def locate(self, index: int) -> str:
        """Where row ``index`` stands: ``train.jsonl, line 7``."""
        return f"{self.name}, {self._unit} {self._numbers[self._indices[index]]}"


def locate(rows: Sequence[Any], index: int) -> str:
    """Where row ``index`` of any sequence stands, for messages."""
    return rows.locate(index) if isinstance(rows, Source) else f"row {index + 1}"


def open_source(config: SourceConfig, *, key: str = "data.train") -> Source:
    """Opens the rows that ``config`` asks for.

    A file has one split, ``train``. ``split`` is taken first, then ``hash_split``, then ``limit``.

    Args:
      config: path, split, hash split and limit.
      key: configuration key that error messages name.

    Raises:
      UserError: the path, split or file is wrong, or nothing is left of the rows.
    """
    wanted = parse_split(config.split, key=key)
    splits = _splits(config, key)
    if wanted.name is None and len(splits) > 1:
        raise UserError(f"{key}.split: {config.path} has several splits: say which of {', '.join(splits)}")
    name = wanted.name or next(iter(splits))
    if name not in splits:
        raise UserError(f"{key}.split: {config.path} has no split {name!r}{nearest(name, splits)}")
    source = splits[name]()
    if not len(source):
        raise UserError(f"{key}: {source.name} is empty: no rows")
    source = source.subset(wanted.rows(len(source)))
    if config.hash_split is not None:
        source = _hash_split(source, config, key)
    if config.limit is not None:
        source = source[: config.limit]
    if not len(source):
        raise UserError(f"{key}: {_selection(config)} keeps none of the rows of {source.name}")
    return source


def _selection(config: SourceConfig) -> str:
    parts = [f"split {config.split!r}"] if config.split else []
    parts += [f"hash_split {list(config.hash_split)}"] if config.hash_split else []
    return " with ".join(parts)


def _splits(config: SourceConfig, key: str) -> Mapping[str, Callable[[], Source]]:
    """What opens each split of a source."""
    if config.path.startswith(TFDS_PREFIX):
        opened = tfds_splits(config.path, config.data_dir, key=key)
        return {name: _named(split, f"{config.path} {name}") for name, split in opened.items()}
    path = Path(local_path(config.path)).expanduser()
    if not path.exists():
        raise UserError(f"{key}: {_missing(path)}{_on_the_hub(config.path)}")
    if path.is_dir():
        return _saved_dataset(path, key)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return {FILE_SPLIT: lambda: _read_jsonl(path, key)}
    if path.name.endswith(".parquet"):
        return {FILE_SPLIT: lambda: _read_parquet(path, key)}
    raise UserError(
        f"{key}: {path} is of no known kind; give *.jsonl, *.jsonl.gz, *.parquet, {TFDS_PREFIX}name, or a folder that "
        "datasets saved with save_to_disk"
    )


def _named(open_rows: Callable[[], Sequence[Any]], name: str, *, filled: bool = False) -> Callable[[], Source]:
    return lambda: Source(open_rows(), name=name, filled=filled)


def _missing(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    what = f"{path} does not exist"
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return what + nearest(path.name, entries, listed=False)


def _on_the_hub(path: str) -> str:
    """What to do where a path that is not there is the name of a data set of the Hub."""
    name = path.removeprefix("hf:").removeprefix("datasets/")
    owner = Path(name.partition("/")[0])
    return f"; {hub_data_advice(name)}" if is_hub_name(name) and not owner.exists() else ""


def _read_jsonl(path: Path, key: str) -> Source:
    rows, numbers = [], []
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            # Bytes are split at "\n" only: text may hold other characters that Python takes for line ends.
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                rows.append(_json_row(line, number, f"{key}: {path}, line {number}"))
                numbers.append(number)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{key}: {path} is a damaged gzip file, after line {number}: {error}") from error
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror or error}") from error
    return Source(rows, name=str(path), unit="line", numbers=numbers)


def _json_row(line: bytes, number: int, where: str) -> dict[str, Any]:
    try:
        row = read_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        # JSON can name half of a surrogate pair, which is no character: a tokenizer cannot take it.
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"{where}: {half} is half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise UserError(f"{where}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # a key given twice, Infinity, an integer of thousands of digits
        raise UserError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    return row


def _read_parquet(path: Path, key: str) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{key}: {path} is no readable Parquet file: {error}") from error
    return Source(arrow_rows(table, lambda index: f"{key}: {path}, row {index + 1}"), name=str(path), filled=True)


def _saved_dataset(path: Path, key: str) -> Mapping[str, Callable[[], Source]]:
    """The splits of a folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    single = (path / "state.json").is_file()
    if not single and not (path / "dataset_dict.json").is_file():
        raise UserError(
            f"{key}: {path} is a folder, but not one that datasets saved with save_to_disk (no state.json, no "
            f"dataset_dict.json){nearest('', sorted(entry.name for entry in path.iterdir()))}"
        )
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{key}: reading {path} needs datasets: pip install 'jaxtune[datasets]'") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: {path} is a damaged saved data set: {error}") from error
    splits = (
        {FILE_SPLIT: (loaded, str(path))}
        if isinstance(loaded, datasets.Dataset)
        else {str(name): (split, f"{path} {name}") for name, split in loaded.items()}
    )
    return {
        split: _named(lambda rows=rows, name=name: _Indexed(rows, f"{key}: {name}"), name, filled=True)
        for split, (rows, name) in splits.items()
    }


class _Indexed(Sequence[dict]):
    """A saved data set as a plain sequence of what is stored: images and sounds, say, are not decoded."""

    def __init__(self, dataset: Any, name: str):
        self._dataset = dataset.with_format("arrow")
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return arrow_rows(self._dataset[int(index)], lambda _: f"{self._name}, row {int(index) + 1}")[0]


def _hash_split(source: Source, config: SourceConfig, key: str) -> Source:
    low, high = config.hash_split or (0.0, 1.0)
    if not 0 <= low < high <= 1:
        raise UserError(f"{key}.hash_split: [{low}, {high}) is no part of [0, 1)")
    kept = []
    for position, index in enumerate(source._indices):
        row = source[position]
        if config.hash_by is not None and config.hash_by not in row:
            raise UserError(
                f"{key}.hash_by: {source.locate(position)} has no field {config.hash_by!r}"
                f"{nearest(config.hash_by, row)}"
            )
        if low <= unit_hash(row if config.hash_by is None else row[config.hash_by], config.hash_seed) < high:
            kept.append(index)
    return source.subset(kept)
