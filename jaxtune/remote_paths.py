"""Places that are not on this machine: object storage, the web, data sets of the Hub. What to type instead."""

from __future__ import annotations

import re

from jaxtune.errors import UserError

# A single letter is a drive of Windows; pathlib makes one slash of two.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_COPY = {"gs": "gcloud storage cp --recursive", "s3": "aws s3 cp --recursive"}
_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
_HUB_DATA = re.compile(rf"(?:huggingface\.co/|hf\.co/)?datasets/({_REPOSITORY})(?:/tree/.*|/viewer.*|/)?")
_HUB_MODEL = re.compile(rf"(?:huggingface\.co/|hf\.co/)?({_REPOSITORY})(?:/tree/.*|/)?")


def local_path(path: str) -> str:
    """A path of this machine, as it stands.

    Nothing else is read or written: without this, ``gs://bucket/run`` would be a folder ``gs:`` where a command runs.

    Raises:
      UserError: it is a URL; the message tells what to type instead.
    """
    if (found := _URL.match(path)) is None:
        return path
    scheme, rest = found[1].lower(), found[2]
    raise UserError(f"{path}: {_instead(scheme, rest)}")


def _instead(scheme: str, rest: str) -> str:
    if scheme == "file":
        return f"give the path alone: /{rest}"
    url, name = f"{scheme}://{rest}", _last_name(rest)
    if scheme in ("hf", "http", "https"):
        if data := _HUB_DATA.fullmatch(rest):
            return hub_data_advice(data[1])
        if model := _HUB_MODEL.fullmatch(rest if scheme == "hf" else rest.partition("huggingface.co/")[2]):
            return f"a model of the Hub is named without its address: {model[1]}"
        if scheme != "hf":
            return f"no files are read from the web; fetch it first (curl -L -o {name} '{url}'), and give ./{name}"
    copy = _COPY.get(scheme)
    first, last = ("", "") if copy is None else (f" ({copy} {url} ./{name})", f" ({copy} ./{name} {url})")
    return (
        f"only paths of this machine are read and written; give one, such as ./{name}, and copy it yourself, before it "
        f"is read{first} or after it was written{last}"
    )


def _last_name(rest: str) -> str:
    names = [part for part in re.split(r"[?#]", rest)[0].split("/") if part]
    return re.sub(r"[^\w.-]", "_", names[-1]) if names else "copy"


def hub_data_advice(name: str) -> str:
    """How a data set of the Hub becomes one that can be read: what to type."""
    folder = name.rpartition("/")[2]
    return (
        f"data sets of the Hub are saved first: pip install 'jaxtune[datasets]', python -c "
        f"\"import datasets; datasets.load_dataset('{name}').save_to_disk('{folder}')\", and give ./{folder}"
    )


def is_hub_name(path: str) -> bool:
    """Whether a path that is not there looks like ``owner/name`` on the Hub, and not like a misspelt file."""
    return re.fullmatch(_REPOSITORY, path) is not None and not re.search(r"\.\w{1,7}$", path)
