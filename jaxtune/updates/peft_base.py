"""The base model that an adapter names: so that it loads, and whether it is the one at hand."""

from __future__ import annotations

from pathlib import Path

from jaxtune.files import replaced
from jaxtune.models.loading import PACKAGED, resolve_path

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
        return str(place.absolute()) if place.is_dir() else base
    place = directory.absolute() / BASE
    if write:
        place.mkdir(parents=True, exist_ok=True)
        for file in resolve_path(base).iterdir():
            with replaced(place / file.name) as copy:
                copy.write(file.read_bytes())
    return str(place)
