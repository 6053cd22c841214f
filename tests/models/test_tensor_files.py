"""Safetensors files against the safetensors library, both ways, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxtune.files import replaced
from jaxtune.models.tensor_files import DTYPES, TensorToWrite, read_header, write_tensors

dtypes = st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple)


def random(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, data=st.data())
def test_reads_any_block_of_what_the_library_wrote(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: type, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("read") / "t.safetensors"
    value = random(shape, dtype)
    save_file({"before": random((3,), dtype, 1), "value": value, "zafter": random((2, 2), dtype, 2)}, path)
    entries, problems = read_header(path)
    assert problems == []
    assert entries["value"].shape == shape
    assert DTYPES[entries["value"].dtype] == value.dtype
    blocks = []
    for size in (shape[0], shape[1] if len(shape) > 1 else 1):
        start = data.draw(st.integers(0, size - 1))
        blocks.append(slice(start, data.draw(st.integers(start + 1, size))))
    part = entries["value"].read(*blocks)
    expected = value[tuple(blocks[: len(shape)])]
    assert part.shape == expected.shape
    assert part.tobytes() == expected.tobytes()
    assert entries["value"].read().tobytes() == value.tobytes()


@settings(max_examples=20, deadline=None)
@given(held=st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4))
def test_library_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, held: list[tuple[tuple[int, ...], type]]
) -> None:
    path = tmp_path_factory.mktemp("write") / "t.safetensors"
    values = {f"tensor.{i}": random(shape, dtype, i) for i, (shape, dtype) in enumerate(held)}
    write_tensors(
        path,
        [TensorToWrite(name, value.dtype, value.shape, lambda value=value: value) for name, value in values.items()],
        {"format": "pt"},
    )
    read = load_file(path)
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        assert read[name].tobytes() == value.tobytes()


def test_same_bytes_compares_contents(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    value = random((5, 3), np.float32)
    other = value.copy()
    other[-1, -1] += 1
    save_file({"a": value, "b": value.copy(), "c": other, "d": value.reshape(3, 5)}, path)
    entries, _ = read_header(path)
    assert entries["a"].same_bytes(entries["b"], block=7)
    assert not entries["a"].same_bytes(entries["c"], block=7)
    assert not entries["a"].same_bytes(entries["d"])


def _damage(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    _, problems = read_header(path)
    return problems


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": random((4, 4), np.float32)}, path)
    sound = path.read_bytes()
    length = struct.unpack("<Q", sound[:8])[0]
    cases = {
        "is truncated: its header promises": sound[:-1],
        "is truncated or no safetensors": sound[: length // 2],
        "is truncated or no": b"PK\x03",
        "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "header that cannot be read": sound[:8] + b"x" * length + sound[8 + length :],
        "which is not F32 of (4, 5)": sound.replace(b"[4,4]", b"[4,5]"),
        "offsets -1 to 64": sound.replace(b"[0,64]", b"[-1,64]"),
    }
    for message, content in cases.items():
        if message.startswith("offsets"):  # the header has become one byte longer
            content = struct.pack("<Q", length + 1) + content[8:]
        problems = _damage(path, content)
        assert len(problems) == 1, message
        assert problems[0].startswith("t.safetensors")
        assert message in problems[0]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"old")

    def fail() -> np.ndarray:
        raise RuntimeError("lost a device")

    with pytest.raises(RuntimeError, match="lost a device"):
        write_tensors(path, [TensorToWrite("a", np.dtype(np.float32), (2,), fail)], {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"
    with replaced(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    wrong = TensorToWrite("a", np.dtype(np.float32), (2,), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="a: float32"):
        write_tensors(tmp_path / "t.safetensors", [wrong], {})
    assert not list(tmp_path.iterdir())
