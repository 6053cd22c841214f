"""From a path or a Hub id to a directory, and from that to a decoder."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtune_kernels.quantized import block_count
from jaxtyping import Array, Key
from numpy.typing import DTypeLike

from jaxtune.errors import UserError, nearest
from jaxtune.models.checkpoint import find_weights, load_params
from jaxtune.models.config import QUANTIZATIONS, DecoderConfig
from jaxtune.models.declarations import declare, random_params
from jaxtune.models.decoder import Decoder
from jaxtune.models.hf_config import read_config
from jaxtune.parallel.platform import compute_dtype
from jaxtune.remote_paths import local_path

PACKAGED = "jaxtune:"
"""Prefix of the models inside the package: ``jaxtune:nano``."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIG_FILES = ("config.json", "generation_config.json")
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")


def load_model(
    path: str | Path,
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    quantize: str | None = None,
) -> Decoder:
    """A pretrained decoder, its arrays cut over the mesh while they are read.

    A host reads of the files what its devices hold and keeps no copy, so the peak of its memory is the sharded result
    and less than 1.2 times the largest tensor in the files. Only JSON and safetensors are read: nothing is unpickled,
    and code that a checkpoint brings is never run.

    Args:
        path: A directory with ``config.json`` and safetensors, a Hub id, or ``jaxtune:nano``.
        mesh: The mesh; the default device if None.
        dtype: Of the arrays and so of the computation. None or ``"auto"``: bfloat16 on accelerators, float32 on CPU.
        revision: Branch, tag or commit of a Hub id.
        quantize: ``nf4``, ``int8`` or ``fp8``: the kernels of the layers are turned into codes as they are read, and
            stay frozen (QLoRA, arXiv:2305.14314); see :func:`quantized_config`.

    Raises:
        UserError: There is no such model, it is not supported, or its files are damaged or do not fit its configuration
            (one message with every mismatch); or it cannot be quantized so.
    """
    directory = resolve_path(path, revision)
    config = quantized_config(read_config(directory), quantize)
    return Decoder(config, load_params(directory, config, _dtype(dtype, mesh), mesh), mesh)


def quantized_config(config: DecoderConfig, quantize: str | None) -> DecoderConfig:
    """The configuration of a model whose layers hold their kernels as codes; all other arrays stay as they are.

    Args:
        config: Of the model.
        quantize: A kind of :data:`~jaxtune.models.config.QUANTIZATIONS`; None leaves the configuration as it is.

    Raises:
        UserError: There is no such kind, or the widths of the model are no whole blocks of it.
    """
    if quantize is None:
        return config
    kind = next((kind for kind in QUANTIZATIONS if kind == quantize), None)
    if kind is None:
        raise UserError(f"model.quantize: there is no {quantize!r}{nearest(quantize, QUANTIZATIONS)}")
    quantized = dataclasses.replace(config, quantization=kind)
    for path, spec in declare(quantized).items():
        try:
            if spec.quantization is not None:
                block_count(spec.quantization, spec.shape[-2])
        except ValueError as error:
            fitting = " or ".join(other for other in QUANTIZATIONS if other != kind)
            raise UserError(f"model.quantize: {kind} does not fit {path}: {error}; choose {fitting}") from None
    return quantized


def check_model(path: str | Path, revision: str | None = None) -> DecoderConfig:
    """The configuration of a model whose weights fit it by name, shape and length, without reading the weights.

    Raises:
        UserError: As :func:`load_model`.
    """
    directory = resolve_path(path, revision)
    config = read_config(directory)
    find_weights(directory, config)
    return config


def random_model(
    config: DecoderConfig, key: Key[Array, ""], mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> Decoder:
    """A decoder with random weights, born cut over the mesh.

    Args:
        config: What it computes.
        key: A typed key (:func:`jax.random.key`); equal keys give equal weights on every mesh.
        mesh: The mesh; the default device if None.
        dtype: As for :func:`load_model`.
    """
    return Decoder(config, random_params(config, key, _dtype(dtype, mesh), mesh), mesh)


def resolve_path(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory of a model: a local one, one inside the package, or a Hub id's, downloaded or from the local cache.

    Args:
        path: As for :func:`load_model`.
        revision: Branch, tag or commit of a Hub id.
        weights: Download the weights too, not only configuration and tokenizer.

    Raises:
        UserError: There is no such directory or Hub id, the Hub cannot be reached, or a revision is asked of what is no
            Hub id.
    """
    name = local_path(str(path))
    packaged, directory = name.startswith(PACKAGED), Path(path).expanduser()
    if revision is not None and (packaged or directory.is_dir()):
        what = "is in the package" if packaged else "is a directory"
        raise UserError(f"{name} {what}; a revision ({revision!r}) is for Hub ids")
    if packaged:
        return _packaged(name)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(f"{name} is a file; a model is a directory with config.json and model.safetensors")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"there is no directory {name}{_siblings(directory)}")
    return _download(name, revision, weights)


def _dtype(dtype: DTypeLike | None, mesh: Mesh | None) -> jnp.dtype:
    return compute_dtype("auto", mesh) if dtype is None or dtype == "auto" else jnp.dtype(dtype)


def _packaged(name: str) -> Path:
    root = Path(__file__).parent
    known = sorted(path.parent.name for path in root.glob("*/config.json"))
    model = name.removeprefix(PACKAGED)
    if model not in known:
        raise UserError(
            f"there is no model {name!r} in the package{nearest(name, [PACKAGED + each for each in known])}"
        )
    return root / model


def _siblings(directory: Path) -> str:
    """Points to a directory with a similar name, if there is one beside the one that is missing."""
    if not directory.parent.is_dir():
        return ""
    phrase = nearest(directory.name, [path.name for path in directory.parent.iterdir() if path.is_dir()])
    return phrase if "did you mean" in phrase else ""


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only Hub ids need it

    patterns = (*_CONFIG_FILES, *TOKENIZER_FILES, *(_WEIGHT_FILES if weights else ()))
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # whatever the network, the Hub or the local cache may raise
        reason = " ".join(str(error).split())
        at = "" if revision is None else f" at revision {revision!r}"
        raise UserError(
            f"there is no directory {name}{_siblings(Path(name))}, and no model could be had from the Hub under that "
            f"name{at}: {reason.rstrip('.')}. Without network, give a directory"
        ) from error
