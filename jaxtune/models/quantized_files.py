"""Checkpoints whose matrices are quantized, read as the numbers that their codes stand for.

Nothing of a file is held: a part of a matrix is made when it is read. Quantized again as it was, with ``model.quantize:
nf4`` for NF4 of bitsandbytes, a matrix has the same codes: the largest entry of each block stands for its absmax.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxtune.models.tensor_files import TensorEntry

_STATE = ".quant_state.bitsandbytes__"
_BLOCK_SCALE = "_scale_inv"


def readable(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` of ``config.json`` is one that is read: bitsandbytes' 4 bits, fp8 in blocks."""
    method = config.get("quant_method")
    if method == "bitsandbytes":
        return bool(config.get("load_in_4bit"))
    return method == "fp8" and bool(config.get("weight_block_size"))


@dataclasses.dataclass(frozen=True)
class FourBitEntry(TensorEntry):
    """A matrix that bitsandbytes packed: two codes a byte, the even entry's first.

    Attributes:
        parts: The tensors that belong to it, by the ends of their names: ``""`` for the codes, ``.absmax``,
            ``.quant_map``; with absmax quantized as well ``.nested_absmax`` and ``.nested_quant_map``.
        blocks: Entries of a block, and absmax of a block of these.
        offset_of_absmax: Added to absmax that was quantized.
    """

    parts: Mapping[str, TensorEntry] = dataclasses.field(default_factory=dict)
    blocks: tuple[int, int] = (64, 256)
    offset_of_absmax: float = 0.0

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> Float[np.ndarray, "rows columns"]:
        """A block of the matrix, float32; reads whole rows."""
        start, stop, _ = rows.indices(self.shape[0])
        width, (block, _) = self.shape[1], self.blocks
        first, last = start * width, stop * width
        packed = self.parts[""].read(slice(first // 2, -(-last // 2))).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
        factors = np.repeat(self._absmax(first // block, -(-last // block)), block)[first % block :][: last - first]
        values = self.parts[".quant_map"].read().astype(np.float32)[codes] * factors
        return values.reshape(stop - start, width)[:, columns]

    def _absmax(self, first: int, last: int) -> Float[np.ndarray, " n"]:
        absmax = self.parts[".absmax"].read(slice(first, last))
        if ".nested_absmax" not in self.parts:
            return absmax.astype(np.float32)
        size = self.blocks[1]
        factors = self.parts[".nested_absmax"].read(slice(first // size, -(-last // size))).astype(np.float32)
        table = self.parts[".nested_quant_map"].read().astype(np.float32)
        return table[absmax] * np.repeat(factors, size)[first % size :][: last - first] + np.float32(
            self.offset_of_absmax
        )


@dataclasses.dataclass(frozen=True)
class BlockScaledEntry(TensorEntry):
    """A matrix of 8-bit floats with a factor for each square of entries, as DeepSeek and Qwen publish them.

    Attributes:
        values: The 8-bit floats.
        factors: Of the squares.
    """

    values: TensorEntry | None = None
    factors: TensorEntry | None = None

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> Float[np.ndarray, "rows columns"]:
        """A block of the matrix, float32."""
        assert self.values is not None
        assert self.factors is not None
        start, stop, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(self.shape[1])
        height, width = (-(-size // count) for size, count in zip(self.shape, self.factors.shape, strict=True))
        above, before = start // height, left // width
        factors = self.factors.read(slice(above, -(-stop // height)), slice(before, -(-right // width)))
        factors = np.repeat(np.repeat(factors.astype(np.float32), height, axis=0), width, axis=1)
        factors = factors[start - above * height :, left - before * width :][: stop - start, : right - left]
        return self.values.read(slice(start, stop), slice(left, right)).astype(np.float32) * factors


def as_floats(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint, with each quantized matrix and what belongs to it as one tensor of floats.

    Args:
        entries: All tensors, by name.

    Raises:
        ValueError: What is said of a matrix cannot be read.
    """
    found = dict(entries)
    for name in entries:
        weight, said, _ = name.partition(_STATE)
        if said and weight in found:
            parts = {"": found.pop(weight)}
            state = found.pop(name)
            for end in (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"):
                if f"{weight}{end}" in found:
                    parts[end] = found.pop(f"{weight}{end}")
            found[weight] = _four_bits(weight, parts, state)
        elif name.endswith(_BLOCK_SCALE) and (weight := name.removesuffix(_BLOCK_SCALE)) in found:
            values = found[weight]
            found[weight] = BlockScaledEntry(
                values.file, "F32", values.shape, values.offset, values.nbytes, values, found.pop(name)
            )
    return found


def _four_bits(name: str, parts: Mapping[str, TensorEntry], state: TensorEntry) -> FourBitEntry:
    try:
        said = json.loads(state.read().tobytes())
        rows, columns = map(int, said["shape"])
        blocks = int(said["blocksize"]), int(said.get("nested_blocksize") or 256)
        offset = float(said.get("nested_offset") or 0.0)
        missing = [end for end in (".absmax", ".quant_map") if end not in parts]
        if missing or parts[""].nbytes != -(-rows * columns // 2):
            raise ValueError(f"{rows} × {columns} entries in {parts[''].nbytes} bytes, without {missing or 'more'}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: its quantization cannot be read ({error})") from None
    codes = parts[""]
    return FourBitEntry(codes.file, "F32", (rows, columns), codes.offset, codes.nbytes, parts, blocks, offset)
