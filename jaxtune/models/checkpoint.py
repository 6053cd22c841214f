"""Weights between safetensors files and sharded arrays, a piece at a time.

Every array is born in its place on the mesh, as zeros, and pieces of the file are written into it by a donated update:
of each tensor a host reads the rows and columns that its devices hold, about :data:`PIECE_BYTES` at once. So the peak
of host memory is the arrays themselves plus a few pieces, however large the file and its tensors are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtune_kernels.quantized import codes_of, largest
from numpy.typing import DTypeLike

from jaxtune.errors import UserError
from jaxtune.files import replaced
from jaxtune.models.config import DecoderConfig, Quantization
from jaxtune.models.declarations import ABSMAX, CODES, ArraySpec, Params, declare, held, shardings
from jaxtune.models.families import WeightName, family_of, weight_names
from jaxtune.models.quantized_files import as_floats
from jaxtune.models.tensor_files import DTYPES, TensorEntry, TensorToWrite, read_header, write_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE_BYTES = 1 << 23
"""Bytes that a host reads at once. Large enough for a disk, small beside the tensors of any real model."""


def find_weights(directory: Path, config: DecoderConfig) -> dict[str, list[TensorEntry]]:
    """Where in the files each array of the decoder lies: one entry for each layer, or one. Reads only headers.

    Raises:
        UserError: No safetensors, or files that are truncated, lack tensors, or have tensors that the decoder does not
            have, or of another shape or dtype: one message with all of them.
    """
    found, problems, unknown_content = _read_headers(directory)
    family, specs, names = family_of(config), declare(config), weight_names(config)
    by_name: dict[str, TensorEntry] = {}
    faults = _Faults()
    for raw, entry in found.items():
        name = family.canonical(raw)
        if name is not None and by_name.setdefault(name, entry) is not entry:
            faults.add(raw, f"holds {name} a second time")
    try:
        by_name = as_floats(by_name)
    except ValueError as error:
        problems.append(str(error))
    result: dict[str, list[TensorEntry]] = {}
    for path, name in names.items():
        shape = _file_shape(specs[path], name)
        for layer in range(config.num_layers if name.stacked else 1):
            entry = by_name.pop(name.of(layer), None)
            if entry is None:
                if not unknown_content(name.of(layer)):
                    faults.add(name.of(layer), "is missing")
                continue
            result.setdefault(path, []).append(entry)
            if entry.shape != shape:
                faults.add(name.of(layer), f"has shape {entry.shape}, not {shape}")
            if entry.dtype not in DTYPES:
                faults.add(name.of(layer), f"has dtype {entry.dtype}: only {', '.join(DTYPES)} are supported")
    head = by_name.pop("lm_head.weight", None) if config.tie_embeddings else None
    problems += faults.sentences()
    problems += _Faults((name, "is not a weight of this model") for name in by_name).sentences()
    if not problems and head is not None and not head.same_bytes(result["embed.table"][0]):
        problems.append("lm_head.weight differs from the embedding, but config.json has tie_word_embeddings = true")
    if problems:
        raise UserError(f"{directory}: the weights do not fit config.json: " + "; ".join(problems))
    return result


def load_params(
    directory: Path, config: DecoderConfig, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> Params:
    """The arrays of a checkpoint, cut over ``mesh`` as declared.

    Args:
        directory: Holds the safetensors files.
        config: What they must fit.
        dtype: Of the arrays that are not quantized; the file's may be another.
        mesh: The mesh; the default device if None.

    Raises:
        UserError: As :func:`find_weights`.
    """
    entries, specs, names = find_weights(directory, config), declare(config), weight_names(config)
    params = _zeros(config, jnp.dtype(dtype), mesh)()
    for path, spec in specs.items():
        parts = (path,) if spec.quantization is None else (f"{path}{CODES}", f"{path}{ABSMAX}")
        filled = _filled(tuple(params[part] for part in parts), entries[path], names[path], spec.quantization, mesh)
        params |= zip(parts, filled, strict=True)
    return params


def save_params(
    params: Mapping[str, jax.Array], config: DecoderConfig, directory: Path, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes arrays as a checkpoint that transformers reads: one file, or several and an index above the limit.

    All processes must call this; the first writes. Weight files that an earlier save left there are removed once the
    new ones are in place.

    Args:
        params: The arrays, by path.
        config: What they are.
        directory: An existing directory.
        max_shard_bytes: Largest file, as far as single tensors allow.
    """
    files: list[list[TensorToWrite]] = [[]]
    for tensor in _tensors(params, config):
        if files[-1] and sum(other.nbytes for other in files[-1]) + tensor.nbytes > max_shard_bytes:
            files.append([])
        files[-1].append(tensor)
    count = len(files)
    paths = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for path, tensors in zip(paths, files, strict=True):
        if jax.process_index() == 0:
            write_tensors(directory / path, tensors, {"format": "pt"})
        else:
            for tensor in tensors:
                tensor.fetch()  # every process takes part in gathering
    if jax.process_index() == 0:
        _finish(directory, paths, files)


def _finish(directory: Path, paths: list[str], files: list[list[TensorToWrite]]) -> None:
    """Writes the index, if there are several files, and removes weight files of earlier saves."""
    keep = {*paths}
    if len(paths) > 1:
        keep.add(INDEX)
        total = sum(tensor.nbytes for tensors in files for tensor in tensors)
        where = {tensor.name: path for path, tensors in zip(paths, files, strict=True) for tensor in tensors}
        with replaced(directory / INDEX) as file:
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
            file.write(text.encode() + b"\n")
    for old in directory.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name) and old.name not in keep:
            old.unlink()


def _tensors(params: Mapping[str, jax.Array], config: DecoderConfig) -> Iterable[TensorToWrite]:
    """The tensors of a checkpoint, layer by layer, in the order in which a model reads them."""
    specs, names = declare(config), weight_names(config)
    first_layered = next(i for i, name in enumerate(names.values()) if name.stacked)

    def tensor(path: str, layer: int) -> TensorToWrite:
        array, name = params[path], names[path]
        fetch = functools.partial(_fetch, array, name, layer)
        return TensorToWrite(name.of(layer), np.dtype(array.dtype), _file_shape(specs[path], name), fetch)

    for i, (path, name) in enumerate(names.items()):
        if i == first_layered:
            for layer in range(config.num_layers):
                yield from (tensor(other, layer) for other in names if names[other].stacked)
        elif not name.stacked:
            yield tensor(path, 0)


def _fetch(array: jax.Array, name: WeightName, layer: int) -> np.ndarray:
    if name.stacked:
        array = _take_layer(array, np.int32(layer))
    if not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    whole = np.asarray(array)
    return whole.T if name.transpose else whole


@jax.jit
def _take_layer(stack: jax.Array, layer: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _file_shape(spec: ArraySpec, name: WeightName) -> tuple[int, ...]:
    shape = spec.shape[1:] if name.stacked else spec.shape
    return shape[::-1] if name.transpose else shape


@functools.cache
def _zeros(config: DecoderConfig, dtype: jnp.dtype, mesh: Mesh | None) -> Callable[[], Params]:
    """A compiled function that makes all arrays in their places, in one program."""

    def zeros() -> Params:
        return {path: jnp.zeros(spec.shape, spec.dtype or dtype) for path, spec in held(config).items()}

    return jax.jit(zeros, out_shardings=None if mesh is None else shardings(config, mesh))


def _filled(
    arrays: tuple[jax.Array, ...],
    entries: list[TensorEntry],
    name: WeightName,
    quantization: Quantization | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, ...]:
    """The arrays, which are donated, with the tensors of its layers written into them: one, or codes and absmax."""
    specs = tuple(
        _pad(array.sharding.spec, array.ndim) if isinstance(array.sharding, NamedSharding) else () for array in arrays
    )
    axes = specs[0] or (None,) * arrays[0].ndim
    if name.stacked and axes[0] is not None:
        raise ValueError(f"{name.template}: the layer axis cannot be cut over {axes[0]}")
    axes = axes[1:] if name.stacked else axes
    axes = axes[::-1] if name.transpose else axes  # those of the tensor in the file
    write = _writer(mesh, specs, axes, name.transpose, name.stacked, quantization)
    for layer, entry in enumerate(entries):
        for start, piece in _pieces(entry, None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))):
            arrays = write(arrays, piece, np.int32(layer), np.int32(start))
            # Without waiting, reading would run ahead and pieces would pile up in memory.
            jax.block_until_ready(arrays)
    return arrays


def _pieces(entry: TensorEntry, sharding: NamedSharding | None) -> Iterable[tuple[int, jax.Array]]:
    """Cuts a tensor into pieces along its first axis: the same rows of every shard together, as one sharded array.

    Yields:
        The first row within the shard, and the piece: of every shard its rows from there on. All pieces have one shape,
        so that they are written by one program; the last one overlaps the one before.
    """
    shard = entry.shape if sharding is None else sharding.shard_shape(entry.shape)
    rows, shards = shard[0], entry.shape[0] // shard[0]
    # The same on every process, since all run one program: by the mesh, not by the devices this process has.
    devices = 1 if sharding is None else max(1, sharding.mesh.size // jax.process_count())
    row_bytes = DTYPES[entry.dtype].itemsize * int(np.prod(shard[1:])) * devices
    height = max(1, min(rows, PIECE_BYTES // row_bytes))
    for start in (min(first, rows - height) for first in range(0, rows, height)):
        if sharding is None:
            yield start, jax.device_put(entry.read(slice(start, start + height)))
            continue
        read = _ReadOnce(entry, rows, start, height)
        yield start, jax.make_array_from_callback((height * shards, *entry.shape[1:]), sharding, read)


class _ReadOnce:
    """Reads a shard's part of a piece from the file once, however many devices hold that shard."""

    def __init__(self, entry: TensorEntry, rows: int, start: int, height: int):
        self.entry, self.rows, self.start, self.height = entry, rows, start, height
        self.blocks: dict[tuple[int, int | None, int | None], np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        if index is None:
            raise ValueError("a sharded array was asked for without an index")
        shard = (index[0].start or 0) // self.height
        columns = index[1] if len(index) > 1 else slice(None)
        key = (shard, columns.start, columns.stop)
        if key not in self.blocks:
            first = shard * self.rows + self.start
            self.blocks[key] = self.entry.read(slice(first, first + self.height), columns)
        return self.blocks[key]


@functools.cache
def _writer(
    mesh: Mesh | None,
    specs: tuple[tuple[Any, ...], ...],
    piece_axes: tuple[Any, ...],
    transpose: bool,
    stacked: bool,
    quantization: Quantization | None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """A compiled ``(arrays, piece, layer, start) -> arrays`` that converts a piece and writes it in place.

    With a mesh every device writes its own part, at the same place within its shard; nothing is communicated but the
    absmax of columns that are cut.
    """

    def write(
        arrays: tuple[jax.Array, ...], piece: jax.Array, layer: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, ...]:
        block = piece.T if transpose else piece
        blocks = (block,) if quantization is None else quantized(quantization, block)
        zero = jnp.zeros((), jnp.int32)

        def written(array: jax.Array, block: jax.Array) -> jax.Array:
            corner = [zero] * block.ndim
            corner[-1 if transpose else 0] = start
            if stacked:
                block, corner = block[None], [layer, *corner]
            return jax.lax.dynamic_update_slice(array, block.astype(array.dtype), corner)

        return tuple(map(written, arrays, blocks))

    def quantized(kind: Quantization, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        absmax = largest(kind, kernel)
        if piece_axes[-1] is not None and specs[1][-2] is None:
            absmax = jax.lax.pmax(absmax, piece_axes[-1])
        return codes_of(kind, kernel, absmax), absmax

    if mesh is not None:
        scalar, places = PartitionSpec(), tuple(PartitionSpec(*spec) for spec in specs)
        write = jax.shard_map(
            write, mesh=mesh, in_specs=(places, PartitionSpec(*piece_axes), scalar, scalar), out_specs=places
        )
    return jax.jit(write, donate_argnums=0)


def _pad(spec: Iterable[Any], length: int) -> tuple[Any, ...]:
    axes = tuple(spec)
    return axes + (None,) * (length - len(axes))


def _read_headers(directory: Path) -> tuple[dict[str, TensorEntry], list[str], Callable[[str], bool]]:
    """All tensors of a directory; what is wrong with its files; and whether a tensor may lie in an unreadable one."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        entries, problems = read_header(single)
        unreadable = bool(problems) and not entries
        return entries, problems, lambda _: unreadable
    if not index.is_file():
        raise UserError(_no_weights(directory))
    try:
        where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: cannot be read as an index of weights ({error})") from None
    entries, problems, broken = {}, [], set()
    for name in files:
        path = directory / str(name)
        if path.parent != directory or not path.is_file():
            problems.append(f"{name} is named in {INDEX} and is not there")
            broken.add(name)
            continue
        held, wrong = read_header(path)
        problems += wrong
        if wrong and not held:
            broken.add(name)
        entries |= held
    return entries, problems, lambda name: where.get(name) in broken


def _no_weights(directory: Path) -> str:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    message = f"{directory}: there is neither {SINGLE} nor {INDEX}"
    if pickled:
        message += (
            f"; {pickled[0]} is a pickle, which can run code and is never read: "
            "convert it with save_pretrained(..., safe_serialization=True)"
        )
    return message


class _Faults:
    """Faults of single tensors, told once for all layers that share them."""

    def __init__(self, faults: Iterable[tuple[str, str]] = ()):
        self.layers: dict[tuple[str, str], list[int]] = {}
        for name, what in faults:
            self.add(name, what)

    def add(self, name: str, what: str) -> None:
        """Notes that the tensor ``name`` ``what`` ("is missing")."""
        layer = re.search(r"(?<=\blayers\.)\d+(?=\.)", name)
        template = name if layer is None else f"{name[: layer.start()]}*{name[layer.end() :]}"
        self.layers.setdefault((template, what), []).extend([] if layer is None else [int(layer[0])])

    def sentences(self) -> list[str]:
        """One sentence a fault; ``layers.0-3,7.`` stands for those layers."""
        return [
            f"{template.replace('*', _ranges(layers), 1)} {what}" for (template, what), layers in self.layers.items()
        ]


def _ranges(numbers: list[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
