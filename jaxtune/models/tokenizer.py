"""Tokenizers, as transformers reads them; no torch and no code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxtune.errors import UserError
from jaxtune.models.loading import TOKENIZER_FILES, resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with its special tokens and chat template.

    It is left as the files describe it: one without a padding token stays without (batches are padded by segment 0,
    which needs no token).

    Args:
        path: A directory with tokenizer files (``tokenizer.json`` is enough), a Hub id, or ``jaxtune:nano``.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        UserError: There is no such directory or Hub id, it has no tokenizer, or one that cannot be read without running
            code that the checkpoint brings.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes a second, and only this function needs it

    directory = resolve_path(path, revision, weights=False)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: there are no tokenizer files ({', '.join(TOKENIZER_FILES[:2])}, …)")
    try:
        if not any((directory / name).is_file() for name in ("tokenizer_config.json", "config.json")):
            return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of tokenizers, json, sentencepiece or transformers, by what is wrong with the files
        raise UserError(f"{path}: the tokenizer cannot be read: {' '.join(str(error).split())}") from error
