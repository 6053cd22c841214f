"""From a decoder to a directory that transformers loads: weights, configuration, tokenizer, and what ends an answer."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxtune.errors import UserError
from jaxtune.files import replaced
from jaxtune.models.checkpoint import save_params
from jaxtune.models.config import DecoderConfig
from jaxtune.models.decoder import Decoder, split
from jaxtune.models.end_tokens import end_tokens
from jaxtune.models.hf_config import checkpoint_config
from jaxtune.models.loading import TOKENIZER_FILES, resolve_path
from jaxtune.models.tokenizer import FIELDS, WHOLE, differing_parts, load_tokenizer, read_fields
from jaxtune.models.weight import dequantized
from jaxtune.remote_paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CARD = """---
library_name: transformers
tags:
- jaxtune
---

The weights are bfloat16. Those of the layers' linear modules were held as {kind} codes while the model was trained:
they are what the codes stand for, with what was trained added, and so differ from the pretrained weights by the error
of that quantization.
"""
"""``README.md`` of a model whose weights were quantized."""

_FROM_FILE = "PreTrainedTokenizerFast"
"""The class of transformers, old and new, that takes ``tokenizer.json`` as it is."""


def save_model(
    model: Decoder,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    tokenizer_revision: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``config.json``, ``generation_config.json`` and the weights so that transformers and we read them.

    The weights keep the model's dtype: loading and saving in the file's dtype changes no bit. Those of a quantized
    model are written out in bfloat16, and ``README.md`` says so. Each file is complete before it takes its name. With
    several processes, all must call this.

    A generation ends there where it ends here: at the model's own end tokens and at those of the tokenizer
    (:func:`jaxtune.models.end_tokens.end_tokens`). The tokenizer that transformers makes of the directory gives the ids
    of ours; where its class for the model would not, ``tokenizer_config.json`` names one that does.

    Args:
        model: The decoder.
        directory: Made if it does not exist.
        tokenizer_from: A directory (or Hub id, or packaged model) whose tokenizer files are copied beside the weights.
        tokenizer_revision: Branch, tag or commit of a Hub id in ``tokenizer_from``.
        max_shard_bytes: Above this the weights are cut into several files with an index.

    Raises:
        UserError: The family's ``config.json`` cannot express the configuration, ``tokenizer_from`` has no tokenizer,
            or transformers reads another one from its files beside this model, whatever they say.
    """
    directory = Path(local_path(str(directory)))
    config, params = dequantized(model.config, split(model)[1])
    dtype = params["embed.table"].dtype.name
    if tokenizer_from is None:
        files = {}
    else:
        source = resolve_path(tokenizer_from, tokenizer_revision, weights=False)
        tokenizer = load_tokenizer(source)
        config = _with_end_tokens(config, tokenizer)
        files = _tokenizer_files(source, tokenizer, checkpoint_config(config, dtype))
    written = files | {
        "generation_config.json": _json(_generation_fields(config)),
        "config.json": _json(checkpoint_config(config, dtype)),
    }
    if config.dequantized_from is not None:
        written["README.md"] = _CARD.format(kind=config.dequantized_from).encode()
    directory.mkdir(parents=True, exist_ok=True)
    save_params(params, config, directory, max_shard_bytes)
    if jax.process_index() != 0:
        return
    for name, content in written.items():
        with replaced(directory / name) as file:
            file.write(content)


def _with_end_tokens(config: DecoderConfig, tokenizer: PreTrainedTokenizerBase) -> DecoderConfig:
    taught = (token for token in end_tokens(tokenizer) if token < config.vocab_size)
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *taught))))


def _generation_fields(config: DecoderConfig) -> dict[str, Any]:
    ends = config.eos_token_ids
    fields = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _tokenizer_files(source: Path, tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files, changed as far as transformers needs it to read the same tokenizer beside the model."""
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return files
    fields = read_fields(source / FIELDS) | {"tokenizer_class": _FROM_FILE}
    if tokenizer.eos_token is not None:
        fields.setdefault("eos_token", str(tokenizer.eos_token))
    whole = {WHOLE: backend.to_str(pretty=True).encode(), **files}
    # For some model types transformers takes its class whatever the file names, unless the file also tells of code of
    # its own, which it then leaves aside.
    unheard = fields | {"auto_map": {"AutoTokenizer": [_FROM_FILE, _FROM_FILE]}}
    for tried in (files, whole | {FIELDS: _json(fields)}, whole | {FIELDS: _json(unheard)}):
        different = _differing_parts(tried, config, tokenizer)
        if not different:
            return tried
    raise UserError(
        f"{source}: transformers would not read this tokenizer beside a model of type {config['model_type']!r}: its "
        f"class for that puts its own {', '.join(different)} in its place; save the model without tokenizer_from"
    )


def _differing_parts(
    files: Mapping[str, bytes], config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What transformers would read otherwise from a directory of the files and ``config.json``."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        for name, content in (*files.items(), ("config.json", _json(config))):
            (Path(directory) / name).write_bytes(content)
        try:
            read = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception:  # whatever its class stumbles over
            return ["everything"]
        return differing_parts(read, tokenizer) if hasattr(read, "backend_tokenizer") else ["everything"]
