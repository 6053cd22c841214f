"""Safetensors files read piece by piece and written tensor by tensor, so that no file is ever held in memory.

The format is eight bytes of header length, a JSON header of names, dtypes, shapes and offsets, then the raw bytes; it
holds no code. Files are checked against their header before a byte of a tensor is read.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.files import replaced

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of weights, by their name in the file."""

CODES: dict[str, np.dtype] = {"U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Dtypes of what stands for weights, in quantized checkpoints."""

INDICES: dict[str, np.dtype] = {"I32": np.dtype(np.int32)}
"""Dtypes of what is no weight, in adapters that say where theirs belong."""

_HELD = DTYPES | INDICES
_NAMES = {dtype: name for name, dtype in _HELD.items()}
_READ = _HELD | CODES
_LARGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        file: The file.
        dtype: Name of the dtype as the file spells it (a key of :data:`DTYPES`, or one that is not supported).
        shape: Its shape.
        offset: First byte, counted from the start of the file.
        nbytes: Number of bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """A block of a vector (``columns`` is then unused) or a matrix, in the file's dtype; reads no other bytes.

        Args:
            rows: Of the first axis; step 1.
            columns: Of the second axis; step 1.
        """
        dtype = _READ[self.dtype]
        start, stop, _ = rows.indices(self.shape[0])
        width = math.prod(self.shape[1:])
        left, right, _ = columns.indices(self.shape[1]) if len(self.shape) > 1 else (0, width, 1)
        out = np.empty((stop - start, *([right - left] if len(self.shape) > 1 else [])), dtype)
        buffer = out.reshape(-1).view(np.uint8).data
        run = (right - left) * dtype.itemsize
        with open(self.file, "rb", buffering=0) as file:
            if right - left == width:
                _fill(file, self.offset + start * width * dtype.itemsize, buffer)
            else:
                for i, row in enumerate(range(start, stop)):
                    first = self.offset + (row * width + left) * dtype.itemsize
                    _fill(file, first, buffer[i * run : (i + 1) * run])
        return out

    def same_bytes(self, other: TensorEntry, block: int = 1 << 23) -> bool:
        """Whether two tensors agree in dtype, shape and every byte."""
        if (self.dtype, self.shape, self.nbytes) != (other.dtype, other.shape, other.nbytes):
            return False
        with open(self.file, "rb") as mine, open(other.file, "rb") as theirs:
            mine.seek(self.offset)
            theirs.seek(other.offset)
            for done in range(0, self.nbytes, block):
                size = min(block, self.nbytes - done)
                if mine.read(size) != theirs.read(size):
                    return False
        return True


def _fill(file: io.FileIO, offset: int, buffer: memoryview) -> None:
    file.seek(offset)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise OSError(f"{file.name}: the file became shorter while it was being read")
        done += count


def read_header(path: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """The tensors that a file holds, and what is wrong with the file.

    Returns:
        The entries by name, and problems (empty for a sound file), each a sentence that starts with the file's name.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            return {}, [f"{path.name} is a Git LFS pointer, not the weights; run `git lfs pull`"]
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return {}, [f"{path.name} is truncated or no safetensors file ({size} bytes)"]
        if length > _LARGEST_HEADER:
            return {}, [f"{path.name} is no safetensors file (its header would have {length} bytes)"]
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, values) for name, values in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{path.name} has a header that cannot be read ({error})"]
    problems = []
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
    if end > size:
        problems.append(f"{path.name} is truncated: its header promises {end} bytes, it has {size}")
    for name, entry in entries.items():
        dtype = _HELD.get(entry.dtype)
        if dtype is not None and entry.nbytes != math.prod(entry.shape) * dtype.itemsize:
            problems.append(
                f"{path.name}: {name} has {entry.nbytes} bytes, which is not {entry.dtype} of {entry.shape}"
            )
    return entries, problems


def _entry(path: Path, base: int, values: dict[str, Any]) -> TensorEntry:
    begin, end = values["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"offsets {begin} to {end}")
    return TensorEntry(path, values["dtype"], tuple(map(int, values["shape"])), base + begin, end - begin)


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor on its way to a file: described first, fetched when its turn comes.

    Attributes:
        name: Its name in the file.
        dtype: A dtype of :data:`DTYPES` or :data:`INDICES`.
        shape: Its shape.
        fetch: Gives the array, of that dtype and shape.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[TensorToWrite], metadata: dict[str, str]) -> None:
    """Writes a safetensors file; at most one tensor is in memory at a time, and a crash leaves no half-written file."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight bytes, as the format asks
    with replaced(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.fetch())
            if array.dtype != tensor.dtype or array.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: {array.dtype} of {array.shape}, not {tensor.dtype} of {tensor.shape}")
            file.write(array.reshape(-1).view(np.uint8).data)
