"""The base model that an adapter names: so that it loads, and whether it is the one at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from jaxtune.config.paths import HUB_ID
from jaxtune.errors import UserError
from jaxtune.files import replaced, write_atomically
from jaxtune.models.hf_config import read_config
from jaxtune.models.loading import PACKAGED, resolve_path
from jaxtune.models.tensor_files import DTYPES, TensorEntry, read_header
from jaxtune.updates.peft.format import CONFIG_FILE, adapter_files
from jaxtune.updates.peft.load import read_adapter_config

BASE = "base"
"""The folder of an adapter's directory that holds its base, where no other program has that by its name."""


def named_base(base: str, directory: Path, *, write: bool = True) -> str:
    """What ``base_model_name_or_path`` says, so that PEFT and transformers find the base from any working directory.

    A model of the package is none that they know: it is written into the adapter's directory. What PEFT is told is an
    absolute path, as it takes a relative one from the working directory.

    Args:
      base: a directory, a Hub id, or a model of the package.
      directory: the adapter's.
      write: write the base where it is to be; one process does.

    Returns:
      An absolute path, or the Hub id; as given where there is no such directory.

    Raises:
      UserError: the package has no such model.
    """
    if not base.startswith(PACKAGED):
        place = Path(base).expanduser()
        return os.path.abspath(place) if place.is_dir() else base
    place = Path(os.path.abspath(directory)) / BASE
    if write:
        place.mkdir(parents=True, exist_ok=True)
        for file in resolve_path(base).iterdir():
            with replaced(place / file.name) as copy:
                copy.write(file.read_bytes())
    return str(place)


def follow_base(directory: Path) -> None:
    """Names the base that lies in an adapter's directory by where it is now, where the directory has moved.

    Changes nothing else: neither an adapter that has no base beside it, nor one whose base is where it says, nor what
    cannot be read or written.
    """
    file, beside = directory / CONFIG_FILE, Path(os.path.abspath(directory)) / BASE
    if not (beside.is_dir() and file.is_file()):
        return
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(file.read_text(encoding="utf-8"))
        named = Path(values.get("base_model_name_or_path") or "")
        if named.name == BASE and not named.is_dir():
            values["base_model_name_or_path"] = str(beside)
            write_atomically(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def check_base(directory: Path, path: str, revision: str | None, model: Path) -> None:
    """Refuses an adapter that was trained on another model than the one at hand, as far as its files tell.

    A base that is a folder is compared by its configuration and, where the weights lie in files of one layout, by parts
    of every tensor. Two Hub ids are compared by name. Anything else may be the same model under two names.

    Args:
      directory: the adapter's.
      path: the model's, as configured.
      revision: of a Hub id.
      model: the folder of the model's files.

    Raises:
      UserError: the adapter names another model.
    """
    named = read_adapter_config(adapter_files(directory)[0])
    base = named.base_model_name_or_path
    if not base or base == path:
        other = named.revision is not None and revision is not None and named.revision != revision
    elif (folder := _folder(base, directory)) is not None:
        other = not folder.samefile(model) and not _alike(folder, model)
    else:
        is_hub_id = not path.startswith(PACKAGED) and not Path(path).expanduser().is_dir()
        other = is_hub_id and HUB_ID.fullmatch(base) is not None and base.lower() != path.lower()
    if other:
        at = (named.revision, revision)
        there, here = (name if one is None else f"{name} at {one}" for name, one in zip((base, path), at, strict=True))
        raise UserError(
            f"model.adapter: {directory} was trained on {there}, and model.path is {here}, another model; set "
            f"model.path to that one, or, if they are the same, base_model_name_or_path in {directory / CONFIG_FILE}"
        )


def _folder(base: str, directory: Path) -> Path | None:
    """The folder of an adapter's base, if it is at hand; one that was written beside it may have moved with it."""
    if base.startswith(PACKAGED):
        return resolve_path(base)
    place, beside = Path(base).expanduser(), directory / BASE
    if place.is_dir():
        return place
    return beside if place.name == BASE and beside.is_dir() else None


def _alike(one: Path, other: Path) -> bool:
    """Whether two folders may hold the same model, as far as its configuration and parts of its tensors tell."""
    first, second = (dataclasses.replace(read_config(place), eos_token_ids=()) for place in (one, other))
    if first != second:
        return False
    for file in sorted(one.glob("*.safetensors")):
        if not (other / file.name).is_file():
            return True  # the same weights may lie in other files
        here, there = read_header(file)[0], read_header(other / file.name)[0]
        comparable = [name for name in here.keys() & there.keys() if here[name].dtype == there[name].dtype]
        if any(_beginning(here[name]) != _beginning(there[name]) for name in comparable):
            return False
    return True


def _beginning(entry: TensorEntry) -> bytes | None:
    """The first row of a tensor, as far as two files of one dtype can be compared by it."""
    return entry.read(slice(0, 1)).tobytes() if entry.dtype in DTYPES and entry.shape else None
