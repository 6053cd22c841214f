"""The configurations that come with the package, and how one becomes a user's own."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jaxtune
from jaxtune.config.loading import load_config
from jaxtune.config.paths import may_be_id, named_paths
from jaxtune.config.schema import Config
from jaxtune.errors import UserError, nearest
from jaxtune.files import check_writable

_PACKAGE = Path(jaxtune.__file__).parent
# In a wheel they are inside the package; in a checkout they lie beside it.
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_REFERENCE = re.compile(r"\bconfigs/(?:studies/)?([\w-]+\.(?:yaml|json))")


@dataclasses.dataclass(frozen=True)
class Copied:
    """A packaged configuration in a folder of the user's.

    Attributes:
      config: the copy.
      written: what was written: the copy, and the files that it refers to.
      kept: files that it refers to which were there already, the same.
      to_set: key -> path, of all paths in it that do not exist.
      command: what runs it: ``jaxtune search quickstart.yaml``.
    """

    config: Path
    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    to_set: dict[str, str]
    command: str


def packaged_configs() -> dict[str, str]:
    """Name -> what it is for, the first sentence of its comment.

    Raises:
      UserError: they are missing from this installation.
    """
    return {name: _purpose(path.read_text(encoding="utf-8")) for name, path in _files(".yaml").items()}


def copy_config(name: str, folder: str | Path = "") -> Copied:
    """Copies a packaged configuration, and the packaged files that it refers to, into a folder; overwrites nothing.

    Args:
      name: one of :func:`packaged_configs`.
      folder: where to; the working directory if empty, from which the copy's paths then work.

    Raises:
      UserError: there is none of this name, a file of a copy's name is there already, or the folder cannot be written.
    """
    configs = _files(".yaml")
    if name not in configs:
        raise UserError(f"there is no packaged configuration {name!r}{nearest(name, configs)}")
    # Beside the copy is where the files that it refers to will be.
    text = _REFERENCE.sub(r"\1", configs[name].read_text(encoding="utf-8"))
    contents = {Path(folder, f"{name}.yaml"): text}
    for file in _files(".json").values():
        if re.search(rf"(?<![\w./-]){re.escape(file.name)}", text):
            contents[Path(folder, file.name)] = file.read_text(encoding="utf-8")
    config = next(iter(contents))
    kept = tuple(path for path, content in contents.items() if path != config and _holds(path, content))
    written = tuple(path for path in contents if path not in kept)
    for path in written:
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: is there already, and is left as it is; move it, or start in another folder")
        check_writable(path, "init")
    # The configuration comes last: where it is, all that it refers to is.
    for path in reversed(written):
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(contents[path])
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    parsed = load_config(config)
    to_set = {
        key: path
        for key, path in named_paths(parsed)
        if not may_be_id(key, path) and not Path(path).expanduser().exists()
    }
    return Copied(config, written, kept, to_set, f"jaxtune {_command(parsed)} {config}")


def _files(suffix: str) -> dict[str, Path]:
    folder = next((place for place in _PLACES if place.is_dir()), None)
    paths = [] if folder is None else sorted(folder.rglob(f"*{suffix}"), key=lambda path: (len(path.parts), path.name))
    found = {path.stem: path for path in paths}
    if not found:
        raise UserError(f"this installation has no packaged configurations in {_PLACES[0]}; install jaxtune again")
    return found


def _purpose(text: str) -> str:
    comment = re.match(r"(?:#.*\n)+", text)
    lines = [] if comment is None else [line.lstrip("# ") for line in comment[0].splitlines()]
    sentence = re.match(r".*?[.?!](?= |$)", " ".join(lines))
    return sentence[0] if sentence is not None else " ".join(lines)


def _holds(path: Path, content: str) -> bool:
    return path.is_file() and path.read_bytes() == content.encode()


def _command(config: Config) -> str:
    studies = config.study.model_fields_set & {"early_score", "data_size", "transfer", "ablation"}
    if studies:
        return f"study {min(studies).replace('_', '-')}"
    return "train" if config.search is None else "search"
