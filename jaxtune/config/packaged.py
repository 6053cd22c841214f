"""The configurations that come with the package, and how one becomes a user's own."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import jaxtune
from jaxtune.config.loading import load_config
from jaxtune.config.paths import located, may_be_id, named_paths
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


def copy_config(name: str, file: str | Path | None = None) -> Copied:
    """Copies a packaged configuration, and the packaged files that it refers to, into a folder; overwrites nothing.

    Args:
      name: one of :func:`packaged_configs`.
      file: the copy, after which the run or study is called; ``NAME.yaml`` in the working directory if None.

    Raises:
      UserError: there is none of this name, ``file`` is no name of a YAML file, a file of a copy's name is there
        already, or the folder cannot be written.
    """
    configs = _files(".yaml")
    if name not in configs:
        raise UserError(f"there is no packaged configuration {name!r}{nearest(name, configs)}")
    # Beside the copy is where the files that it refers to will be.
    text = _REFERENCE.sub(r"\1", configs[name].read_text(encoding="utf-8"))
    copy = Path(f"{name}.yaml" if file is None else file)
    if copy.suffix not in (".yaml", ".yml"):
        raise UserError(f"{copy}: a configuration is a YAML file; name it {copy.name or name}.yaml")
    if file is not None:
        called = re.sub(r"[^A-Za-z0-9._-]", "-", copy.stem).lstrip(".-") or name
        text = re.sub(r"^name: .*$", f"name: {called}", text, count=1, flags=re.MULTILINE)
    contents = {copy: text}
    for part in _files(".json").values():
        if re.search(rf"(?<![\w./-]){re.escape(part.name)}", text):
            contents[copy.with_name(part.name)] = part.read_text(encoding="utf-8")
    config = copy
    kept = tuple(path for path, content in contents.items() if path != config and _holds(path, content))
    written = tuple(path for path in contents if path not in kept)
    for path in written:
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: is there already, and is left as it is; move it, or start in another folder")
        check_writable(path, "init")
    # The configuration comes last: where it is, all that it refers to is.
    for path in reversed(written):
        try:
            with open(path, "x", encoding="utf-8") as written_file:
                written_file.write(contents[path])
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    parsed = load_config(config)
    places = dict(named_paths(located(parsed)))
    to_set = {
        key: path
        for key, path in named_paths(parsed)
        if not may_be_id(key, path) and not Path(places[key]).expanduser().exists()
    }
    return Copied(config, written, kept, to_set, f"jaxtune {_command(parsed)} {shlex.quote(str(config))}")


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
