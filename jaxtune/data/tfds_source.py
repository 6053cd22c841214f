"""TensorFlow Datasets without TensorFlow: array_record files read by index."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data.values import plain
from jaxtune.errors import UserError, nearest
from jaxtune.files import cache_directory

TFDS_PREFIX = "tfds:"

# Builders of our own: importing the module registers the name. They generate their rows and download nothing.
OWN_BUILDERS = {"product_listings": "jaxtune.data.product_listings", "nano_corpus": "jaxtune.data.nano_corpus"}


def tfds_splits(path: str, data_dir: str | None, *, key: str) -> Mapping[str, Callable[[], Sequence[Any]]]:
    """What opens each split of ``tfds:name[/config][:version]``.

    Data that is not prepared yet is prepared first, as array_record files, with progress on stderr: our own builders
    generate theirs, others download.

    Args:
      path: the name, with its prefix.
      data_dir: where prepared data lies (or one data set's own folder, which holds dataset_info.json). By default
        TFDS's own directory, and for our own builders ``jaxtune/tfds`` in the user's cache directory.
      key: configuration key that error messages name.

    Raises:
      UserError: there is no such data set, or it is neither prepared nor can it be.
    """
    import tensorflow_datasets as tfds

    name = path.removeprefix(TFDS_PREFIX)
    base = name.split("/")[0].split(":")[0]
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and (folder / "dataset_info.json").is_file():
        builder = tfds.builder_from_directory(folder)
        if builder.name != base:
            raise UserError(f"{key}: {folder} holds {builder.name}, not {base}")
        return _open_splits(builder, key)
    if base in OWN_BUILDERS:
        importlib.import_module(OWN_BUILDERS[base])
        folder = folder or _cache_directory(key)
    try:
        # A name alone is looked up in the data directory first, then among the known builders.
        where: dict[str, Any] = {} if folder is None else {"data_dir": str(folder)}
        builder = tfds.builder(name, **where)
        if not builder.is_prepared():
            builder = tfds.builder(name, file_format="array_record", **where)
    except tfds.core.DatasetNotFoundError as error:
        prepared = [entry.name for entry in folder.iterdir()] if folder is not None and folder.is_dir() else []
        choices = sorted({*OWN_BUILDERS, *prepared, *tfds.list_builders(with_community_datasets=False)})
        raise UserError(f"{key}: TFDS knows no data set {base!r}{nearest(base, choices)}") from error
    except (ValueError, AssertionError) as error:
        # TFDS tells of a wrong configuration, version or name in several paragraphs; the choices are in the class.
        raise UserError(f"{key}: {path} is no data set of TFDS: {_reason(error)}{_variants(base)}") from error
    if not builder.is_prepared():
        _prepare(builder, key, path, generated=base in OWN_BUILDERS)
    return _open_splits(builder, key)


def _cache_directory(key: str) -> Path:
    folder = cache_directory() / "tfds"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot write to {folder} ({error.strerror}): set {key}.data_dir") from error
    return folder


def _prepare(builder: Any, key: str, path: str, *, generated: bool) -> None:
    # TFDS prints to stdout, which is kept for results. It speaks of downloading whatever it does.
    if generated:
        print(f"generating {path} in {builder.data_dir}", file=sys.stderr, flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO() if generated else sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        raise UserError(
            f"{key}: {path} is not prepared in {builder.data_dir}, and preparing it needs {error.name}, which is not "
            "installed; prepare it elsewhere as array_record and give its data_dir"
        ) from error
    except OSError as error:
        # Another process may have prepared the same data meanwhile; its files are as good as ours.
        if builder.is_prepared():
            return
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(
            f"{key}: {path} is not prepared in {builder.data_dir} and could not be prepared there: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The last sentence of an error that TFDS has wrapped in its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rpartition('}": ')[2] if lines else type(error).__name__


def _variants(base: str) -> str:
    """The configurations and versions of a data set, for messages."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_cls(base)
    except (ValueError, tfds.core.DatasetNotFoundError):
        return ""
    parts = {"configurations": sorted(builder.builder_configs), "versions": [str(builder.VERSION)]}
    return "".join(f"; {name}: {', '.join(values[:12])}" for name, values in parts.items() if values)


def _open_splits(builder: Any, key: str) -> Mapping[str, Callable[[], Sequence[Any]]]:
    if not builder.info.splits:
        raise UserError(f"{key}: {builder.data_dir} holds no prepared split")
    return {name: _opener(builder, name, key) for name in builder.info.splits}


def _opener(builder: Any, split: str, key: str) -> Callable[[], Sequence[Any]]:
    def open_split() -> Sequence[Any]:
        try:
            return _Decoded(builder.as_data_source(split=split))
        except NotImplementedError as error:
            raise UserError(
                f"{key}: {builder.data_dir} is stored as {builder.info.file_format}; only array_record can be read by "
                "index: prepare it with file_format='array_record'"
            ) from error

    return open_split


class _Decoded(Sequence[dict]):
    """Rows of a TFDS data source as plain Python values."""

    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return plain(_narrow(self._rows[int(index)]))


def _narrow(value: Any) -> Any:
    """TFDS keeps every number with a fraction in 32 bits, and hands single ones out as Python's, which have 64."""
    if isinstance(value, Mapping):
        return {name: _narrow(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_narrow(entry) for entry in value]
    return np.float32(value) if isinstance(value, float) and np.float32(value) == value else value
