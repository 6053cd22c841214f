"""Where the files are that a configuration names.

A relative path is meant from the folder of the configuration's file, or, where nothing is there, from the working
directory of whoever ran it. A run directory keeps both folders (``paths_from``), from itself and in full, so that it
can be used from any working directory, moved by itself and moved together with them. What is recorded of a run has the
paths as they were given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config.schema import Config
from jaxtune.errors import UserError
from jaxtune.layout import RunFiles

PATHS_FROM = "paths_from"
"""The key of the folders."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""What a model's path may be, besides a folder's."""


def named_paths(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of all that may name a file or a folder to be read; a model's may be a Hub id as well."""
    model, data, search = config.model, config.data, config.search
    yield from _given({"model.path": model.path, "model.tokenizer": model.tokenizer, "model.adapter": model.adapter})
    for part in ("train", "validation", "test"):
        if (source := getattr(data, part)) is not None:
            yield from _given({f"data.{part}.path": source.path, f"data.{part}.data_dir": source.data_dir})
    if data.explode is not None:
        yield from _given({"data.explode.schema_path": data.explode.schema_path})
    if search is not None:
        yield from _given({"search.start_from": search.start_from})
    yield from _given({"study.ablation.search": config.study.ablation.search})


def may_be_id(key: str, path: str) -> bool:
    """Whether what a key names may be on the Hub."""
    return key in ("model.path", "model.tokenizer") and HUB_ID.fullmatch(path) is not None


def _given(paths: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    # jaxtune:nano, tfds:name and addresses are no paths.
    yield from ((key, path) for key, path in paths.items() if path is not None and ":" not in path.split("/")[0])


def with_folders(config: Config, file: Path, given: Collection[str], *, begun: bool) -> Config:
    """A configuration that knows from where its relative paths are meant.

    Args:
      config: as read from a file, with the overrides of a command.
      file: that file.
      given: the dotted keys that were overridden, to the last part: what they name is meant from the working directory.
      begun: the file is that of a run directory, which names the folders itself.
    """
    here, home = os.getcwd(), os.path.abspath(file.parent)
    if PATHS_FROM in given:
        folders = [os.path.join(here, folder) for folder in config.paths_from]
    elif config.paths_from or begun:
        folders = [os.path.join(home, folder) for folder in config.paths_from]
    else:
        folders = [home, here]
    folders = list(dict.fromkeys(map(os.path.normpath, folders))) or [here]
    relative = _relative(config, folders)
    if not relative:
        return config
    known = config.model_copy(update={PATHS_FROM: folders})
    changed = {
        key: os.path.relpath(os.path.join(here, path), folders[0])
        for key, path in relative.items()
        if any(key == name or key == f"{name}.path" for name in given)
        and os.path.exists(path)
        and os.path.abspath(_found(path, folders) or path) != os.path.abspath(path)
    }
    return _replaced(known, changed)


def recorded(config: Config, directory: str | Path) -> Config:
    """The configuration as the ``config.yaml`` of a run directory has it.

    Args:
      config: of the run.
      directory: where the file is to lie.
    """
    folders = config.paths_from or [os.getcwd()]
    if not _relative(config, folders):
        return config
    # Moved together with them, the run finds the folders from itself; copied, it takes the copies.
    from_here = [os.path.relpath(folder, directory) for folder in folders]
    return config.model_copy(update={PATHS_FROM: [*from_here, *folders]})


def located(config: Config) -> Config:
    """The configuration with its paths as they are to be opened now; those that lead nowhere stay as they are."""
    changed = {}
    for key, path in named_paths(config):
        place = _found(path, config.paths_from)
        if place is not None and os.path.abspath(place) != os.path.abspath(os.path.expanduser(path)):
            changed[key] = place
    return _replaced(config, changed)


def check_there(config: Config, section: str) -> None:
    """Refuses a run that has begun and that names files or folders which are there no more.

    Args:
      config: of the run.
      section: whose paths are to be opened: ``model``, ``data.train``.

    Raises:
      UserError: one is gone; names its key, where it was looked for and what to do.
    """
    if not RunFiles(config.directory).config_path.is_file():
        return
    for key, path in named_paths(config):
        if key.startswith(f"{section}.") and not may_be_id(key, path) and _found(path, config.paths_from) is None:
            raise UserError(f"{key}: {_gone(path, config)}")


def _relative(config: Config, folders: Sequence[str]) -> dict[str, str]:
    """Key and value of the relative paths; what may be a Hub id is one, unless there is such a folder."""
    return {
        key: path
        for key, path in named_paths(config)
        if not os.path.isabs(os.path.expanduser(path)) and not (may_be_id(key, path) and _found(path, folders) is None)
    }


def _gone(path: str, config: Config) -> str:
    """That a file is gone, where it was looked for, and what to do."""
    if os.path.isabs(os.path.expanduser(path)):
        return f"{path} is gone; put it, or a link to it, back there"
    looked = " or ".join(config.paths_from or [os.getcwd()])
    return (
        f"{path} is gone: it is not in {looked}; put it back, or say where such paths are meant from now: "
        f"{PATHS_FROM}=FOLDER"
    )


def _found(path: str, folders: Sequence[str]) -> str | None:
    """Where a path leads: in the first of the folders that has it, or else as it stands; None where nothing is."""
    expanded = os.path.expanduser(path)
    places = [*(os.path.join(folder, expanded) for folder in folders), expanded]
    return next((os.path.normpath(place) for place in places if os.path.exists(place)), None)


def _replaced(config: Config, paths: Mapping[str, str]) -> Config:
    """The configuration with some paths changed."""
    for key, path in paths.items():
        config = _set(config, key.split("."), path)
    return config


def _set(section: Any, parts: Sequence[str], value: str) -> Any:
    first, *rest = parts
    return section.model_copy(update={first: _set(getattr(section, first), rest, value) if rest else value})
