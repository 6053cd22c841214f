"""Tokenizers, as their files describe them; no torch and no code from the checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.errors import UserError
from jaxtune.models.loading import TOKENIZER_FILES, resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WHOLE = "tokenizer.json"
FIELDS = "tokenizer_config.json"
# The class of transformers that does nothing beside reading the file, by its names in releases before 5 and since.
_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with its special tokens and chat template.

    It is left as the files describe it: one without a padding token stays without (batches are padded by segment 0,
    which needs no token). Where transformers' class for the model would replace parts of ``tokenizer.json`` by its own,
    the file's are used. Where no file of the tokenizer names an end-of-text token, ``config.json``'s is taken.

    Args:
        path: A directory with tokenizer files (``tokenizer.json`` is enough), a Hub id, or ``jaxtune:nano``.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        UserError: There is no such directory or Hub id, it has no tokenizer, or one that cannot be read without running
            code that the checkpoint brings.
    """
    directory = resolve_path(path, revision, weights=False)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: there are no tokenizer files ({', '.join(TOKENIZER_FILES[:2])}, …)")
    try:
        tokenizer, overruled = _read(directory)
        if overruled:
            logger.warning("%s: %s; the file's are used", path, overruled)
        if not any(read_fields(directory / name).get("eos_token") for name in (FIELDS, "special_tokens_map.json")):
            name_end_token(tokenizer, directory)
    except Exception as error:  # of tokenizers, json, sentencepiece or transformers, by what is wrong with the files
        raise UserError(f"{path}: the tokenizer cannot be read: {' '.join(str(error).split())}") from error
    return tokenizer


def differing_parts(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """Which of the parts that turn text into ids and back differ between two tokenizers.

    Templates and the names of special tokens are not among them, and of the post-processor only what it does to a text
    counts, as transformers writes the same one in several ways.
    """
    parts = [
        name for name in ("normalizer", "pre_tokenizer", "model", "decoder") if _part(one, name) != _part(other, name)
    ]
    if _added(one) != _added(other):
        parts.append("added tokens")
    if not parts and one("a")["input_ids"] != other("a")["input_ids"]:
        parts.append("post_processor")
    return parts


def _read(directory: Path) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, and what transformers' own choice would have changed of it."""
    from transformers import PreTrainedTokenizerFast  # takes a second, and only this function needs it

    if (directory / WHOLE).is_file() and _is_all_there_is(directory):
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True), ""

    from transformers import AutoTokenizer  # takes another one, and two more where there is torch, which it imports

    if not (directory / WHOLE).is_file():
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True), ""
    try:
        chosen = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception:
        # A tokenizer of the checkpoint's own code may be more than its file; a class that the file does not fit is not.
        if "auto_map" in read_fields(directory / FIELDS):
            raise
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True), ""
    if type(chosen) is PreTrainedTokenizerFast:
        return chosen, ""
    from_file = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    parts = differing_parts(chosen, from_file)
    if not parts:
        return chosen, ""
    return from_file, f"transformers' {type(chosen).__name__} has its own {', '.join(parts)} in place of {WHOLE}'s"


def _is_all_there_is(directory: Path) -> bool:
    """Whether no file names a class beyond the one that reads ``tokenizer.json`` as it is."""
    if not any((directory / name).is_file() for name in (FIELDS, "config.json")):
        return True
    fields = read_fields(directory / FIELDS)
    return fields.get("tokenizer_class") in _AS_IT_IS and "auto_map" not in fields


def _part(tokenizer: Any, name: str) -> Any:
    """What a part of a tokenizer does, told so that two ways to write the same are equal."""
    part = getattr(tokenizer.backend_tokenizer, name)
    state = {} if part is None else json.loads(part.__getstate__())
    # A model's vocabulary and merges are as they are, and long.
    return _set_fields(state) if name == "model" else _meaning(state, decodes=name == "decoder")


def _meaning(value: Any, *, decodes: bool) -> Any:
    if isinstance(value, list):
        return [_meaning(item, decodes=decodes) for item in value]
    if not isinstance(value, dict):
        return value
    if decodes and value.get("type") == "ByteLevel":
        return {"type": "ByteLevel"}  # its other fields are for the way to ids
    # Offsets are places in the text, of which ids and text do not depend.
    return _set_fields({key: _meaning(item, decodes=decodes) for key, item in value.items() if key != "trim_offsets"})


def _set_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields but for those that are off, which may as well be left out."""
    return {key: value for key, value in fields.items() if value not in (None, "", False, [])}


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token: repr(added) for token, added in tokenizer.added_tokens_decoder.items()}


def name_end_token(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Gives a tokenizer the end-of-text token that a model's configuration names, if it names one, and says so.

    Args:
        tokenizer: One whose own files name none.
        directory: The model's.
    """
    model = read_fields(directory / "config.json")
    model = {**model, **(model.get("text_config") or {})}
    named = model.get("eos_token_id", read_fields(directory / "generation_config.json").get("eos_token_id"))
    first = named[0] if isinstance(named, list) and named else named
    token = tokenizer.convert_ids_to_tokens(first) if isinstance(first, int) and 0 <= first < len(tokenizer) else None
    if not isinstance(token, str) or token == tokenizer.eos_token:
        return
    tokenizer.eos_token = token
    logger.warning(
        "%s: no file of the tokenizer names an end-of-text token; answers end with %r (%d), which the model's "
        "configuration names",
        directory,
        token,
        first,
    )


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none where there is no such file, or where it holds something else."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values if isinstance(values, dict) else {}
